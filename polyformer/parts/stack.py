"""A stack of blocks. It keeps `flow.path`, from which layers name their slots in caches and traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from polyformer.parts.attention import Projected
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from polyformer.parts.flow import Flow


class Stack(Spec):
    """Blocks one after the other, then a norm (which pre-norm models need). A depth pattern is a pattern here."""

    blocks: tuple[Spec, ...]
    norm: Spec | None = None

    def module(self) -> Part:
        return StackPart(self)


class StackPart(Part):
    """x [B, S, D] -> [B, S, D]."""

    blocks: nn.ModuleList
    norm: Part | None

    def __init__(self, spec: Stack) -> None:
        super().__init__(spec)
        for block in self.blocks:
            for name, inner in block.named_modules():
                if isinstance(inner, Projected):
                    inner.slot = name

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        outer = flow.path
        for i, block in enumerate(self.blocks):
            flow.path = f"{outer}{i}."
            x = block(x, flow)
        flow.path = outer
        return x if self.norm is None else self.norm(x, flow)
