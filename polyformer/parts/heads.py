"""What turns a stack's rows into answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.parts.linear import Linear
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class LMHead(Spec):
    """Rows to a score for each token of the vocabulary: cap · tanh(projection(scale · before(x)) / cap).

    The matrix is often tied to the token embedding. `before` is the transformation of BERT's masked-word head, `scale`
    is T5's 1/√width, `cap` is Gemma 2's bound on scores. A head that is no LM head is a `Chain` of steps.
    """

    projection: Spec
    before: Spec | None = None
    scale: float = 1.0
    cap: float | None = None

    def check(self) -> None:
        self.require(self.cap is None or self.cap > 0, f"cap must be positive, not {self.cap}")

    @classmethod
    def of_width(cls, width: int, vocabulary: int, bias: bool = False) -> LMHead:
        """Return the plain head: one matrix."""
        return cls(Linear(width, vocabulary, bias))

    def module(self) -> Part:
        return LMHeadPart(self)


class LMHeadPart(Part):
    """x [..., D] -> [..., V]."""

    projection: Part
    before: Part | None

    def __init__(self, spec: LMHead) -> None:
        super().__init__(spec)
        self.scale, self.cap = spec.scale, spec.cap

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        scores = self.projection(self.prepare(x, flow), flow)
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap

    def prepare(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        """Return the rows as the projection takes them: [..., D]."""
        x = x if self.before is None else self.before(x, flow)
        return x if self.scale == 1.0 else x * self.scale
