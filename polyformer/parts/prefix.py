"""Trained keys and values before a layer's own, and trained rows before a text's tokens.

Shape letters: B batch, S queries, K keys, D width, G key/value heads, E head width, P places of a prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.adapters import Adapter, AdapterPart, Before
from polyformer.parts.attention import Attention
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.embeddings import TokenEmbedding
from polyformer.parts.flow import Ahead, Cache, Flow, Pair
from polyformer.parts.kernels.capped import Capped
from polyformer.parts.kernels.softmax import Softmax
from polyformer.parts.kernels.tiled import Tiled
from polyformer.parts.linear import Linear
from polyformer.parts.part import Part, draw_normal
from polyformer.parts.view import View
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.adapters import Acting


class Prefix(Adapter):
    """P trained keys and values that stand before those of a self-attention's own rows (P-Tuning v2: Liu et al. 2022,
    section 3.2; Li and Liang 2021), as if so many tokens had been read before: the rows' places begin behind them.

    `width` is that of all keys of a row, G · E. Keys are as the kernel sees them: no position turns them.
    """

    tokens: int
    width: int

    def check(self) -> None:
        self.require(self.tokens > 0 and self.width > 0, "tokens and width must be at least 1")

    def breaks(self) -> Mapping[Clause, Term]:
        return {"packed": Refuses("each document would need the prefix before it")}

    def fits(self, base: Spec) -> str:
        if not isinstance(base, Attention):
            return f"{type(base).__name__} has no keys of its own rows"
        if not isinstance(base.kernel, Softmax | Capped | Tiled):
            return f"{type(base.kernel).__name__} takes no keys that stand before a text"
        width = base.heads.groups * base.heads.width
        return "" if width == self.width else f"its keys are {self.width} wide, and this attention's {width}"

    def module(self) -> Part:
        return PrefixPart(self)


class MadePrefix(Prefix):
    """A prefix that a network of two layers makes of P trained rows [P, D], which steadies training (Li and Liang
    2021, section 4.3): tanh between `first` [D -> M] and `last` [M -> 2 · width], which gives keys and values.

    The prefixes of all layers share rows and the first layer: they are tied.
    """

    first: Spec
    last: Spec

    def check(self) -> None:
        super().check()
        for name in ("first", "last"):
            self.require(isinstance(getattr(self, name), Linear), f"{name} must be a Linear")

    @classmethod
    def of_widths(cls, name: str, tokens: int, width: int, rows: int, hidden: int) -> MadePrefix:
        """Return the prefix made of rows of a width, by way of a hidden layer of another."""
        return cls(name, 1.0, tokens, width, Linear(rows, hidden), Linear(hidden, 2 * width))

    def module(self) -> Part:
        return MadePrefixPart(self)


class Prompt(Adapter):
    """Trained vectors for tokens of its own, which a tuned model reads before a text (Lester et al. 2021, section 2).

    They are numbered from the vocabulary's end on, or from that of earlier prompts: `first` is the first one's id.
    """

    tokens: int
    width: int
    first: int

    def check(self) -> None:
        self.require(self.tokens > 0 and self.width > 0, "tokens and width must be at least 1")

    def fits(self, base: Spec) -> str:
        if not isinstance(base, TokenEmbedding):
            return f"{type(base).__name__} reads no tokens"
        if self.first < base.vocabulary:
            return f"the id {self.first} is that of a token"
        return "" if base.width == self.width else f"it is {self.width} wide, and the tokens {base.width}"

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids that are read before a text."""
        return tuple(range(self.first, self.first + self.tokens))

    def module(self) -> Part:
        return PromptPart(self)


class PrefixPart(AdapterPart):
    """Holds keys and values [P, G · E] each."""

    changes_flow = True
    spec: Prefix

    def __init__(self, spec: Prefix) -> None:
        super().__init__(spec)
        if type(spec) is Prefix:
            self.keys = nn.Parameter(torch.empty(spec.tokens, spec.width))
            self.values = nn.Parameter(torch.empty(spec.tokens, spec.width))
            for one in (self.keys, self.values):
                draw_normal(one, 1.0)

    def pair(self) -> Pair:
        """Return keys and values, each [P, G · E]."""
        return self.keys, self.values

    def around(self, flow: Flow, acting: Callable[[Flow], Acting]) -> Flow:
        """Return the flow in which prefixes stand before all keys, for each sequence those that act on it."""
        if not flow.pieces:
            return _ahead(flow, acting(flow))
        pieces = [dataclasses.replace(one, flow=_ahead(one.flow, acting(one.flow))) for one in flow.pieces]
        positions = torch.cat([one.flow.positions for one in pieces], 1)
        return dataclasses.replace(flow, pieces=tuple(pieces), positions=positions)


class MadePrefixPart(PrefixPart):
    """Holds rows [P, D] and a network."""

    spec: MadePrefix
    first: Part
    last: Part

    def __init__(self, spec: MadePrefix) -> None:
        super().__init__(spec)
        assert isinstance(spec.first, Linear)
        self.rows = nn.Parameter(torch.empty(spec.tokens, spec.first.inputs))
        draw_normal(self.rows, 1.0)

    def pair(self) -> Pair:
        made = self.last(torch.tanh(self.first(self.rows, None)), None)
        keys, values = made.chunk(2, -1)
        return keys, values


def _ahead(flow: Flow, acting: Acting) -> Flow:
    """Return one sequence's or batch's flow with the prefixes that act before its keys."""
    prefixes = [(part, share) for part, share in acting if isinstance(part, PrefixPart)]
    if not prefixes:
        return flow
    for part, share in prefixes:
        part.agree(flow)
        if share != 1.0:
            raise SpecError(f"a prefix acts or doesn't; '{part.spec.name}' can't have a share of {share:g}")
    pairs = [part.pair() for part, _ in prefixes]
    keys, values = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
    wider = flow.once(("prefix", len(keys)), lambda: _behind(flow, len(keys)))
    return dataclasses.replace(wider, cache=Ahead(_lasting(flow.cache), keys, values), path=flow.path)


def _lasting(cache: Cache | Ahead | None) -> Cache | None:
    assert not isinstance(cache, Ahead)  # a prefix stands around attention, and attention in no other
    return cache


def _behind(flow: Flow, places: int) -> Flow:
    """Return a flow whose keys stand behind so many places that are always real."""
    view = flow.view
    batch = (len(view.valid), places) if view.valid is not None else ()
    valid = None if view.valid is None else torch.cat((view.valid.new_ones(batch), view.valid), 1)
    wider = View(view.queries, view.keys + places, valid, None, view.right_padded, view.device)
    return dataclasses.replace(flow, view=wider, positions=flow.positions + places, _made={})


class PromptPart(AdapterPart):
    """ids [B, S], of which some are its own, -> [B, S, D]."""

    spec: Prompt

    def __init__(self, spec: Prompt) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.tokens, spec.width))
        draw_normal(self.weight, spec.width**-0.5)

    def _own(self, ids: Tensor) -> Tensor:
        return (ids >= self.spec.first) & (ids < self.spec.first + self.spec.tokens)

    def enter(self, x: Tensor, share: float) -> Tensor:
        return x.masked_fill(self._own(x), 0)

    def leave(self, y: Tensor, before: Before, share: float) -> Tensor:
        own = self._own(before.x)
        rows = self.weight[(before.x - self.spec.first).clamp(0, self.spec.tokens - 1)]
        return torch.where(own[..., None], rows.to(y.dtype), y)
