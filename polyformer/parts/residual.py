"""Residual connections, whose filled slots say where norms and dropout stand; and plain sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from polyformer.parts.flow import Flow


class Residual(Spec):
    """x -> after(x + post(op(pre(x)))).

    `after` a norm: the 2017 paper's "Add & Norm" (post-norm). `pre` a norm: GPT-2's pre-norm. `pre` and `post`
    norms: sandwich. Dropout of a sublayer's output stands in `post`.
    """

    op: Spec
    pre: Spec | None = None
    post: Spec | None = None
    after: Spec | None = None

    def module(self) -> Part:
        return ResidualPart(self)


class Chain(Spec):
    """One step after the other."""

    steps: tuple[Spec, ...]

    def check(self) -> None:
        self.require(len(self.steps) > 0, "needs at least one step")

    def module(self) -> Part:
        return ChainPart(self)


class Identity(Spec):
    """Rows as they are."""

    def module(self) -> Part:
        return IdentityPart(self)


class Branches(Spec):
    """The sum of several steps on the same rows: attention and feed-forward side by side (GPT-J, GPT-NeoX, PaLM)."""

    steps: tuple[Spec, ...]

    def check(self) -> None:
        self.require(len(self.steps) > 0, "needs at least one step")

    def module(self) -> Part:
        return BranchesPart(self)


class ResidualPart(Part):
    """x [B, S, D] -> [B, S, D]."""

    op: Part
    pre: Part | None
    post: Part | None
    after: Part | None

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        y = x if self.pre is None else self.pre(x, flow)
        y = self.op(y, flow)
        if self.post is not None:
            y = self.post(y, flow)
        x = x + y
        return x if self.after is None else self.after(x, flow)


class ChainPart(Part):
    """x through every step."""

    steps: nn.ModuleList

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        for step in self.steps:
            x = step(x, flow)
        return x


class IdentityPart(Part):
    """x -> x."""

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return x


class BranchesPart(Part):
    """x [B, S, D] -> the sum of what the steps make of it."""

    steps: nn.ModuleList

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        first, *others = self.steps
        total: Tensor = first(x, flow)
        for step in others:
            total = total + step(x, flow)
        return total
