"""Convolutions over the rows of a sequence, and Conformer's module of them. Padding is never heard.

Shape letters: B batch, S length, C channels, D width, K kernel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.feedforward import ACTIVATIONS, Activation
from polyformer.parts.linear import Linear
from polyformer.parts.norms import BatchNorm, Norm
from polyformer.parts.part import Part, draw_normal
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Convolution(Spec):
    """A convolution along the sequence, with W [outputs, inputs / groups, kernel].

    With a `stride`, or without enough `padding` (zeros on both sides), there are fewer rows afterwards.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True

    def check(self) -> None:
        sizes = (self.inputs, self.outputs, self.kernel, self.stride, self.groups)
        self.require(min(sizes) > 0, "inputs, outputs, kernel, stride and groups must be at least 1")
        self.require(0 <= self.padding < self.kernel, f"a padding of {self.padding} is not within the kernel")
        even = self.inputs % self.groups == 0 and self.outputs % self.groups == 0
        self.require(even, f"{self.groups} groups can't share {self.inputs} inputs and {self.outputs} outputs evenly")

    def breaks(self) -> Mapping[Clause, Term]:
        found: dict[Clause, Term] = {}
        if self.kernel > 1 or self.stride > 1:
            found["cached"] = Refuses("it hears rows on both sides, and a cache holds none of its inputs")
            found["packed"] = Refuses("where two documents meet, it would hear both at once")
        if self.stride > 1 or 2 * self.padding != self.kernel - 1:
            found["padded on the left"] = Refuses("it makes fewer rows, which it counts from each sequence's first")
        return found

    def module(self) -> Part:
        return ConvolutionPart(self)


class ChannelNorm(Norm):
    """(x - mean) / sqrt(variance + eps) · gain + bias of each channel over the real rows of its sequence.

    This is group normalisation with a group to each channel (Wu and He 2018), as wav2vec 2.0's first layer has it.
    """

    def breaks(self) -> Mapping[Clause, Term]:
        return {
            "cached": Refuses("its statistics are of the whole sequence"),
            "packed": Refuses("its statistics are of the whole row"),
        }

    def module(self) -> Part:
        return ChannelNormPart(self)


class GatedConvolution(Spec):
    """Conformer's convolution module: dropout(down(activation(norm(depthwise(glu(up(x))))))).

    Gulati et al. 2020, section 2.2. `up` doubles the width, and the gated linear unit halves it again.
    """

    up: Spec
    depthwise: Spec
    norm: Spec
    down: Spec
    activation: Activation = "silu"
    dropout: Spec | None = None

    @classmethod
    def of_width(cls, width: int, kernel: int, activation: Activation = "silu") -> GatedConvolution:
        """Return the published form; an even kernel would have no middle, and is an error."""
        if kernel % 2 == 0:
            raise SpecError(f"a depthwise kernel of {kernel} has no middle; it should be odd")
        depthwise = Convolution(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        up, down = Linear(width, 2 * width, bias=False), Linear(width, width, bias=False)
        return cls(up, depthwise, BatchNorm(width), down, activation)

    def module(self) -> Part:
        return GatedConvolutionPart(self)


class ConvolutionPart(Part):
    """x [B, S, inputs] -> [B, S', outputs]; where S' is another length, `flow` then tells of the new rows."""

    def __init__(self, spec: Convolution) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.outputs, spec.inputs // spec.groups, spec.kernel))
        self.bias = nn.Parameter(torch.zeros(spec.outputs)) if spec.bias else None
        self.kernel, self.stride, self.padding, self.groups = spec.kernel, spec.stride, spec.padding, spec.groups
        draw_normal(self.weight, (spec.inputs // spec.groups * spec.kernel) ** -0.5)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        real, before = flow.rows_valid, x.shape[1]
        after = (before + 2 * self.padding - self.kernel) // self.stride + 1
        if after < 1:
            raise SpecError(f"{before} rows are too few for a convolution over {self.kernel}")
        if real is not None and self.padding:
            x = x.masked_fill(~real[..., None], 0.0)
        if after != before:
            lengths = None if real is None else real.sum(1) + 2 * self.padding - self.kernel
            flow.renew(after, None if lengths is None else (lengths // self.stride + 1).clamp(min=0))
        x = x.transpose(1, 2)
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups).transpose(1, 2)


class ChannelNormPart(Part):
    """x [B, S, width] -> the same shape."""

    def __init__(self, spec: ChannelNorm) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(spec.width))
        self.bias = nn.Parameter(torch.zeros(spec.width))
        self.eps = spec.eps

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        real = flow.rows_valid
        if real is None:
            rows = torch.group_norm(x.transpose(1, 2), x.shape[2], self.weight, self.bias, self.eps)
            return rows.transpose(1, 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        counted = real[..., None].to(wide.dtype)
        count = counted.sum(1, keepdim=True).clamp(min=1)
        centred = wide - (wide * counted).sum(1, keepdim=True) / count
        variance = (centred.square() * counted).sum(1, keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps)).to(x.dtype) * self.weight + self.bias


class GatedConvolutionPart(Part):
    """x [B, S, D] -> [B, S, D]."""

    up: Part
    depthwise: Part
    norm: Part
    down: Part
    dropout: Part | None

    def __init__(self, spec: GatedConvolution) -> None:
        super().__init__(spec)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        x = self.depthwise(F.glu(self.up(x, flow), -1), flow)
        x = self.down(self.activation(self.norm(x, flow)), flow)
        return x if self.dropout is None else self.dropout(x, flow)
