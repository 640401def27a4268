"""From token ids to vectors: the table, its scale, and how positions join."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.linear import Linear
from polyformer.parts.part import Part, draw_normal
from polyformer.parts.positions import Position
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class TokenEmbedding(Spec):
    """A trained vector of `width` for each of `vocabulary` tokens.

    The row of the token `padding` gets no gradient from being looked up (though it may from a head tied to it).
    """

    vocabulary: int
    width: int
    padding: int | None = None

    def check(self) -> None:
        self.require(self.vocabulary > 0 and self.width > 0, "vocabulary and width must be at least 1")
        known = self.padding is None or 0 <= self.padding < self.vocabulary
        self.require(known, f"padding {self.padding} is no token of a vocabulary of {self.vocabulary}")

    def module(self) -> Part:
        return TokenEmbeddingPart(self)


class Combine(Spec, abstract=True):
    """How position vectors join token vectors."""


class Add(Combine):
    """tokens + positions, both of the model's width (Vaswani et al. 2017)."""

    def module(self) -> Part:
        return AddPart(self)


class Concatenate(Combine):
    """[tokens; positions]: their widths add up to the model's."""

    def module(self) -> Part:
        return ConcatenatePart(self)


class Gate(Combine):
    """g · tokens + (1 - g) · positions, with g = sigmoid(W [tokens; positions] + b) for each element."""

    mix: Spec

    @classmethod
    def of_width(cls, width: int) -> Gate:
        """Return a gate for vectors of `width`."""
        return cls(Linear(2 * width, width))

    def module(self) -> Part:
        return GatePart(self)


class Embed(Spec):
    """Token ids to the rows that enter a stack: dropout(norm(combine(scale · token, position))).

    The 2017 paper scales the tokens by √width (section 3.4), so that they outweigh the positions added to them.
    """

    tokens: Spec
    positions: Position | None = None
    combine: Combine = Add()
    scale: float = 1.0
    norm: Spec | None = None
    dropout: Spec | None = None

    def module(self) -> Part:
        return EmbedPart(self)


class TokenEmbeddingPart(Part):
    """ids [B, S] -> [B, S, width]."""

    def __init__(self, spec: TokenEmbedding) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.vocabulary, spec.width))
        self.padding = spec.padding
        draw_normal(self.weight, spec.width**-0.5)

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return F.embedding(x, self.weight, self.padding)


class CombinePart(Part):
    """(tokens [B, S, W], positions [1 or B, S, P]) -> [B, S, D]."""

    def join(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Join the two."""
        raise NotImplementedError


def _refuse_other_width(tokens: Tensor, positions: Tensor) -> None:
    if tokens.shape[-1] != positions.shape[-1]:
        raise SpecError(f"tokens {tokens.shape[-1]} wide can't be mixed with positions {positions.shape[-1]} wide")


class AddPart(CombinePart):
    """Sum."""

    def join(self, tokens: Tensor, positions: Tensor) -> Tensor:
        _refuse_other_width(tokens, positions)
        return tokens + positions


class ConcatenatePart(CombinePart):
    """Side by side."""

    def join(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return torch.cat((tokens, positions.expand(*tokens.shape[:2], -1)), -1)


class GatePart(CombinePart):
    """A learned share for each element."""

    mix: Part

    def join(self, tokens: Tensor, positions: Tensor) -> Tensor:
        _refuse_other_width(tokens, positions)
        positions = positions.expand_as(tokens)
        gate = torch.sigmoid(self.mix(torch.cat((tokens, positions), -1)))
        return torch.lerp(positions, tokens, gate)


class EmbedPart(Part):
    """ids [B, S] -> [B, S, D]."""

    tokens: Part
    positions: Part | None
    combine: CombinePart
    norm: Part | None
    dropout: Part | None

    def __init__(self, spec: Embed) -> None:
        super().__init__(spec)
        self.scale = spec.scale

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        x = self.tokens(x, flow)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            x = self.combine.join(x, self.positions(x, flow))
        if self.norm is not None:
            x = self.norm(x, flow)
        return x if self.dropout is None else self.dropout(x, flow)
