"""A stack of blocks. It keeps `flow.path`, from which layers name their slots in caches and traces."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyformer.parts.part import Part, name_slots
from polyformer.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from polyformer.parts.flow import Flow


class Stack(Spec):
    """Blocks one after the other, then a norm (which pre-norm models need). A depth pattern is a pattern here.

    In training, each block is left out of a pass with probability `layerdrop` (Fan et al. 2020).
    """

    blocks: tuple[Spec, ...]
    norm: Spec | None = None
    layerdrop: float = 0.0

    def check(self) -> None:
        self.require(0 <= self.layerdrop < 1, f"layerdrop must be in [0, 1), not {self.layerdrop}")

    def module(self) -> Part:
        return StackPart(self)


class Pyramid(Spec):
    """Stages of blocks, between which rows are merged into fewer and wider ones (Liu et al. 2021, section 3.1)."""

    stages: tuple[Stack, ...]
    merges: tuple[Spec, ...]
    norm: Spec | None = None

    def check(self) -> None:
        between = max(len(self.stages) - 1, 0)
        self.require(len(self.merges) == between, f"{len(self.stages)} stages need {between} merges between them")

    def module(self) -> Part:
        return PyramidPart(self)


class Repeat(Spec):
    """One block walked several times with the same weights (sharing across layers: ALBERT, Lan et al. 2020)."""

    block: Spec
    times: int

    def check(self) -> None:
        self.require(self.times > 0, "times must be at least 1")

    def module(self) -> Part:
        return RepeatPart(self)


class StackPart(Part):
    """x [B, S, D] -> [B, S, D].

    Attributes:
        recompute: keep of each block, where gradients are wanted, the rows that go in alone, and walk it once more for
            the way back (Chen et al. 2016).
    """

    blocks: nn.ModuleList
    norm: Part | None

    def __init__(self, spec: Stack) -> None:
        super().__init__(spec)
        self.layerdrop, self.recompute = spec.layerdrop, False
        name_slots(self.blocks)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        outer = flow.path
        for i, block in enumerate(self.blocks):
            if self.training and self.layerdrop and float(torch.rand(())) < self.layerdrop:
                continue
            flow.path = f"{outer}{i}."
            x = _walked_again(block, x, flow) if self.recompute and torch.is_grad_enabled() else block(x, flow)
        flow.path = outer
        return x if self.norm is None else self.norm(x, flow)


def _walked_again(block: nn.Module, x: Tensor, flow: Flow) -> Tensor:
    """Walk a block that will be walked again; what layers share each walk makes for itself, or the two would differ."""
    path, made = flow.path, dict(flow._made)

    def walk(x: Tensor) -> Tensor:
        found: Tensor = block(x, replace(flow, path=path, _made=dict(made)))
        return found

    answer: Tensor = checkpoint(walk, x, use_reentrant=False)
    return answer


class PyramidPart(Part):
    """x [B, S, D] -> [B, S', D']."""

    stages: nn.ModuleList
    merges: nn.ModuleList
    norm: Part | None

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        outer = flow.path
        for i, stage in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](x, flow)
            flow.path = f"{outer}{i}."
            x = stage(x, flow)
        flow.path = outer
        return x if self.norm is None else self.norm(x, flow)


class RepeatPart(Part):
    """x [B, S, D] -> [B, S, D]. Each walk has slots of its own, as it has keys of its own."""

    block: Part

    def __init__(self, spec: Repeat) -> None:
        super().__init__(spec)
        self.times = spec.times

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        outer = flow.path
        for i in range(self.times):
            flow.path = f"{outer}{i}x."
            x = self.block(x, flow)
        flow.path = outer
        return x
