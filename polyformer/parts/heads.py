"""What turns a stack's rows into answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from polyformer.parts.linear import Linear
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class LMHead(Spec):
    """Rows to a score for each token of the vocabulary. Its matrix is often tied to the token embedding."""

    projection: Spec

    @classmethod
    def of_width(cls, width: int, vocabulary: int, bias: bool = False) -> LMHead:
        """Return the plain head: one matrix."""
        return cls(Linear(width, vocabulary, bias))

    def module(self) -> Part:
        return LMHeadPart(self)


class LMHeadPart(Part):
    """x [..., D] -> [..., V]."""

    projection: Part

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return self.projection(x, flow)
