"""The position-wise feed-forward network and its gated forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.linear import Linear
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "gelu_quick", "silu", "tanh", "identity"]


class FeedForward(Spec):
    """down(activation(up(x))), or with a gate down(activation(gate(x)) · up(x)).

    ReLU is the 2017 paper's (section 3.3); `silu` with a gate is SwiGLU, `gelu` with a gate GEGLU (Shazeer 2020).
    With `gate_up`, one matrix makes what goes through `gate` and, behind it in each row, what goes through `up`.
    """

    up: Spec
    down: Spec
    activation: Activation = "relu"
    gate: Spec | None = None
    dropout: Spec | None = None
    gate_up: Spec | None = None

    def check(self) -> None:
        self.require(self.gate_up is None or self.gate is not None, "gate_up makes the gate's share too; name a gate")

    @classmethod
    def of_widths(cls, width: int, hidden: int, activation: Activation = "relu", bias: bool = True) -> FeedForward:
        """Return the plain form: width -> hidden -> width."""
        return cls(Linear(width, hidden, bias), Linear(hidden, width, bias), activation)

    @classmethod
    def gated(cls, width: int, hidden: int, activation: Activation = "silu", bias: bool = False) -> FeedForward:
        """Return the gated form: SwiGLU, or GEGLU with `gelu`."""
        up, down = Linear(width, hidden, bias), Linear(hidden, width, bias)
        return cls(up, down, activation, gate=Linear(width, hidden, bias))

    def module(self) -> Part:
        return FeedForwardPart(self)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def through_gate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """Return activation(gate) · up; in training, what the activation gave is made again rather than kept."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or gate.dtype != up.dtype:
        return activation(gate) * up
    found: Tensor = GatedProduct.apply(activation, gate, up)  # type: ignore[no-untyped-call]
    return found


class GatedProduct(torch.autograd.Function):
    """(activation, gate [..., F], up [..., F]) -> activation(gate) · up, of which gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            again = gate.detach().requires_grad_()
            shown = ctx.activation(again)
        (of_gate,) = torch.autograd.grad(shown, again, gradient * up)
        return None, of_gate, gradient * shown.detach()


class FeedForwardPart(Part):
    """x [B, S, D] -> [B, S, D]."""

    up: Part
    down: Part
    gate: Part | None
    dropout: Part | None
    gate_up: Part | None

    def __init__(self, spec: FeedForward) -> None:
        super().__init__(spec)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if self.gate is None:
            hidden = self.activation(self.up(x, flow))
        else:
            gated, plain = (x, x) if self.gate_up is None else self.gate_up(x, flow).chunk(2, -1)
            hidden = through_gate(self.activation, self.gate(gated, flow), self.up(plain, flow))
        if self.dropout is not None:
            hidden = self.dropout(hidden, flow)
        return self.down(hidden, flow)
