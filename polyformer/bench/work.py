"""One attention set up for one length, ready to be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from polyformer.bench.contestants import At, Contestant
from polyformer.errors import SpecError
from polyformer.parts import Attention, Context, Flow, Heads, Idle, Kernel, Linear, Part
from polyformer.parts.flow import start_flow
from polyformer.parts.kernels.kernel import KernelPart
from polyformer.parts.view import View
from polyformer.spec import Record, Spec, rewrite

Level = Literal["kernel", "whole"]
Mode = Literal["forward", "training"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class HeadSizes(Record):
    """What all contestants are given.

    Attributes:
        heads, head: how many there are, and the width of each.
        batch: sequences at a time.
        dtype: of the numbers.
        level: "kernel": q, k and v are given, and an op that owns its matrices goes without them; "whole": with the
            matrices, from rows [B, n, heads · head] to rows.
    """

    heads: int = 8
    head: int = 64
    batch: int = 1
    dtype: Dtype = "float32"
    level: Level = "kernel"

    def check(self) -> None:
        self.require(min(self.heads, self.head, self.batch) > 0, "heads, head and batch must be at least 1")


def spec_of(contestant: Contestant, sizes: HeadSizes, length: int) -> Spec:
    """Return what is built: at the level "kernel", a kernel, or an op whose matrices pass their rows unchanged.

    Raises:
        SpecError: the contestant can't be of these sizes, or not under its rule.
    """
    at = At(sizes.heads, sizes.head, length)
    made = contestant.make(at)
    if isinstance(made, Kernel):
        heads = Heads.of_width(at.width, at.heads)
        whole = Attention.of_heads(at.width, heads, contestant.rule(at)).replace(kernel=made)
        return made if sizes.level == "kernel" else whole

    def without(path: str, record: Record) -> Record:
        return Idle(()) if isinstance(record, Linear) else record

    return rewrite(made, without) if sizes.level == "kernel" else made


class Work:
    """A contestant with its inputs, which are the same for all.

    A run is a forward pass, or a training step: forward, and backward to all inputs and weights. What layers of a model
    share in a pass (the rule lowered to a mask or a layout) is made in the first run and kept for the next ones.
    """

    def __init__(self, contestant: Contestant, sizes: HeadSizes, length: int) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, sizes.dtype)
        self.rule = contestant.rule(At(sizes.heads, sizes.head, length))
        self.part: Part = spec_of(contestant, sizes, length).build(dtype=dtype)
        chance = torch.Generator().manual_seed(length)
        many = isinstance(self.part, KernelPart)
        heads, rows = (sizes.batch, sizes.heads, length, sizes.head), (sizes.batch, length, sizes.heads * sizes.head)
        shape = heads if many else rows
        self.inputs = [torch.randn(shape, generator=chance, dtype=dtype) for _ in range(3 if many else 1)]
        self.slope = torch.randn(shape, generator=chance, dtype=dtype)
        self.leaves = [*self.inputs, *(weight for weight in self.part.parameters() if weight.requires_grad)]
        for one in self.inputs:
            one.requires_grad_()
        self.flow: Flow = start_flow(self.slope.new_empty(sizes.batch, length))

    def forget(self) -> None:
        """Forget what layers share, as at the beginning of a pass."""
        view = self.flow.view
        self.flow = Flow(View(view.queries, view.keys, None, None, False, view.device), self.flow.positions)

    def runs(self, mode: Mode) -> Callable[[], tuple[Tensor, ...]]:
        """Return what is timed; it gives its answers, and in training the gradients."""
        return self._forward if mode == "forward" else self._training

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, ...]:
        return (self._answer(),)

    def _training(self) -> tuple[Tensor, ...]:
        answer = self._answer()
        return answer, *torch.autograd.grad(answer, self.leaves, self.slope)

    def _answer(self) -> Tensor:
        if isinstance(self.part, KernelPart):
            q, k, v = self.inputs
            return self.part.attend((q, k, v), Context(self.rule, self.flow.view))
        return self.part(self.inputs[0], self.flow)


def refusal(error: Exception) -> str:
    """Return why a run failed, if that is no fault of ours; else raise it again."""
    if isinstance(error, SpecError):
        return str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the system had not enough memory"
    if "not implemented" in str(error):
        return f"PyTorch can't: {str(error).splitlines()[0]}"
    raise error
