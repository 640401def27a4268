"""From token ids to vectors: the table, its scale, and how positions join."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.adapters import AfterPrefix
from polyformer.parts.inputs import InputPart
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
    """tokens + positions, both of the model's width (Vaswani et al. 2017).

    Each may go through a step of its own first, as through dropout in Reformer.
    """

    tokens: Spec | None = None
    positions: Spec | None = None

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


class Lookup(Spec):
    """A trained vector of `width` for each of `count` values of a further input, such as "token_type_ids" (BERT's
    segments) or "langs" (XLM's languages).

    Without that input, all rows have the value 0, or, where `absent` is "nothing", nothing is added.
    """

    input: str
    count: int
    width: int
    absent: Literal["first", "nothing"] = "first"

    def check(self) -> None:
        self.require(self.count > 0 and self.width > 0, "count and width must be at least 1")

    def module(self) -> Part:
        return LookupPart(self)


class Embed(Spec):
    """Token ids to the rows that enter a stack: project(dropout(norm(combine(scale · token, position) + others))).

    The 2017 paper scales the tokens by √width (section 3.4), so that they outweigh the positions added to them.
    `rounding` says whether the scale is rounded to the model's precision first, as Gemma's is.
    `project` widens narrow embeddings to the model's width (factorised embeddings, Lan et al. 2020, section 3.1).
    """

    tokens: Spec
    positions: Position | AfterPrefix | None = None
    combine: Combine = Add()
    scale: float = 1.0
    rounding: Literal["none", "model"] = "none"
    others: tuple[Lookup, ...] = ()
    norm: Spec | None = None
    dropout: Spec | None = None
    project: Spec | None = None

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


class LookupPart(Part):
    """The rows' values of an input -> [B, S, width], or where there is no such input [1, 1, width], or [] (zero)."""

    def __init__(self, spec: Lookup) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.count, spec.width))
        self.input, self.absent = spec.input, spec.absent
        draw_normal(self.weight, 0.02)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        values = flow.inputs.get(self.input)
        if values is None:
            return self.weight[:1][None] if self.absent == "first" else self.weight.new_zeros(())
        if values.shape != x.shape[:2]:
            raise SpecError(f"{self.input} has shape {list(values.shape)}, but the rows {list(x.shape[:2])}")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < len(self.weight):
            raise SpecError(f"{self.input} has values outside of 0 … {len(self.weight) - 1}")
        return F.embedding(values, self.weight)


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

    tokens: Part | None
    positions: Part | None

    def join(self, tokens: Tensor, positions: Tensor) -> Tensor:
        _refuse_other_width(tokens, positions)
        tokens = tokens if self.tokens is None else self.tokens(tokens, None)
        return tokens + (positions if self.positions is None else self.positions(positions, None))


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


class EmbedPart(InputPart):
    """ids [B, S] -> [B, S, D]."""

    tokens: Part
    positions: Part | None
    combine: CombinePart
    others: nn.ModuleList
    norm: Part | None
    dropout: Part | None
    project: Part | None

    def __init__(self, spec: Embed) -> None:
        super().__init__(spec)
        self.scale, self.rounding = spec.scale, spec.rounding
        self.reads = frozenset(other.input for other in spec.others)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        x = self.tokens(x, flow)
        if self.scale != 1.0:
            x = x * (torch.tensor(self.scale, dtype=x.dtype).item() if self.rounding == "model" else self.scale)
        if self.positions is not None:
            x = self.combine.join(x, self.positions(x, flow))
        for other in self.others:
            x = x + other(x, flow)
        for step in (self.norm, self.dropout, self.project):
            x = x if step is None else step(x, flow)
        return x
