"""Rows cut into chunks, each of which looks at its neighbours: what local attention and Reformer's hashing share.

Rows stand in chunks in the order of the text, or in any other: a `Layout` says which stands where.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width, R rounds of hashing, M runs of
chunks, N chunks of a run, C rows of a chunk, W chunks that each looks at. A small b or h is 1 where all are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.rules import Rule
from polyformer.parts.view import View
from polyformer.spec import Record

NOBODY = -1
"""Stands in a layout where no row does."""


class Chunks(Record):
    """Chunks of `size` rows, each of which looks at itself, at `before` chunks before it and `after` behind it.

    `ends` "apart": what would stand before the first chunk or behind the last is nobody, so that neither padding nor
    other documents change an answer. "joined" is how Reformer was published: the chunks stand in a circle, in which the
    first one looks back at the last, and a chunk that is met twice on a short circle counts twice. Rows of a circle are
    filled up to a multiple of `multiple` (None: of `size`), as its length is part of the answer.

    A row of no more than `whole` tokens (None: `size`) is not cut: each looks at all.
    """

    size: int
    before: int = 1
    after: int = 0
    ends: Literal["apart", "joined"] = "apart"
    multiple: int | None = None
    whole: int | None = None

    def check(self) -> None:
        self.require(self.size > 0, f"size must be at least 1, not {self.size}")
        self.require(min(self.before, self.after) >= 0, "before and after can't be negative")
        if self.multiple is not None:
            self.require(self.ends == "joined", "only chunks whose ends are joined need a multiple")
            fits = self.multiple > 0 and self.multiple % self.size == 0
            self.require(fits, f"multiple {self.multiple} is none of the size {self.size}")
        fits = self.whole is None or 0 <= self.whole <= self.size
        self.require(fits, f"whole must be between 0 and the size {self.size}, not {self.whole}")

    def within(self, keys: int) -> Chunks:
        """Return how a row of so many keys is cut."""
        return self if self.cuts(keys) else Chunks(max(keys, 1), 0)

    def cuts(self, keys: int) -> bool:
        """Return whether a row of so many keys is cut at all."""
        return keys > (self.size if self.whole is None else self.whole)

    def filled(self, keys: int) -> int:
        """Return how long a row is with what it is filled up with."""
        unit = self.multiple or self.size
        return -(-keys // unit) * unit

    def near(self, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return which of `count` chunks each looks at, integers [N, W], and where that is nobody, or None."""
        steps = torch.arange(-self.before, self.after + 1, device=device)
        own = torch.arange(count, device=device)[:, None]
        if self.ends == "joined":
            return (own + steps.masked_fill(steps.abs() >= count, 0)) % count, None
        found = own + steps
        return found.clamp(0, count - 1), (found < 0) | (found >= count)


@dataclass
class Layout:
    """Which row of a batch stands where among chunks, and who looks at whom.

    Attributes:
        chunks: how rows are cut.
        rows: the place of each row, integers [b, h, M, N, C], or `NOBODY`.
        slots: the inverse: where each row stands in its round, integers [b, h, R, K].
        first: the first chunk in which a query stands. Those before it are looked at only.
    """

    chunks: Chunks
    rows: Tensor
    slots: Tensor
    first: int = 0

    @classmethod
    def of(cls, view: View, chunks: Chunks, buckets: Tensor | None = None) -> Layout:
        """Lay out the keys of a view.

        Padding stands behind what is real; documents stand one after the other, each in chunks of its own where the
        ends of runs are apart.

        Args:
            view: whose keys are real, and of which documents; its queries are the last of them.
            chunks: how rows are cut.
            buckets: what else they are sorted by, integers [B, H, R, K] from 0; None leaves them in order.
        """
        places = torch.arange(view.keys, device=view.device)
        groups = _groups(view)
        order, slots = _order(view, groups, buckets), places[None]
        length = chunks.filled(view.keys)
        if groups is not None and view.key_documents is not None and chunks.ends == "apart":
            slots, length = _each_in_chunks(groups.sort(1).values, chunks.size)
        slots = slots[:, None, None].expand_as(order)
        rows = order.new_full((*order.shape[:-1], length), NOBODY).scatter_(-1, slots, order)
        if chunks.ends == "joined":
            rows = rows.flatten(2)[:, :, None]
        slots = torch.empty_like(order).scatter_(-1, order, slots)
        past = view.keys - view.queries
        first = int(slots[..., past:].min()) // chunks.size if past and view.queries else 0
        return cls(chunks, torch.unflatten(rows, -1, (-1, chunks.size)), slots, first)

    @property
    def asking(self) -> Tensor:
        """Who stands in the chunks from the first in which a query does: [b, h, M, N', C]."""
        return self.rows[:, :, :, self.first :]

    def beside(self, x: Tensor) -> Tensor:
        """Lay what each chunk looks at side by side: [B, h, M, N, C, ...] -> [B, h, M, N', W·C, ...]."""
        index, _ = self.chunks.near(self.rows.shape[3], x.device)
        if index.shape[1] == 1 and not self.first:
            return x
        found = x.index_select(3, index[self.first :].flatten())
        return torch.unflatten(found, 3, (-1, index.shape[1])).flatten(4, 5)

    def asked(self) -> Tensor:
        """Who is looked at by each chunk: [b, h, M, N', W·C]."""
        found = self.beside(self.rows)
        _, lacking = self.chunks.near(self.rows.shape[3], found.device)
        if lacking is None:
            return found
        return found.masked_fill(lacking[self.first :].repeat_interleave(self.chunks.size, 1), NOBODY)

    def spread(self, weights: Tensor, view: View) -> Tensor:
        """Lay the weights of chunks [B, H, M, N', C, W·C] out among all queries and keys: [B, H, S, K]."""
        past = view.keys - view.queries
        asking, asked = self.asking[..., None] - past, self.asked()[..., None, :]
        index = (asking * view.keys + asked).masked_fill((asking < 0) | (asked < 0), view.queries * view.keys)
        found = weights.new_zeros(*weights.shape[:2], view.queries * view.keys + 1)
        found.scatter_add_(2, index.expand_as(weights).flatten(2), weights.flatten(2))
        return torch.unflatten(found[..., :-1], 2, (view.queries, view.keys))


def allowed(rule: Rule, view: View, asking: Tensor, asked: Tensor) -> Tensor:
    """Return where rows [b, h, ..., C] may look at others [b, h, ..., W·C]: boolean [b, h, ..., C, W·C]."""
    found = view.among(rule, asking[..., None].clamp(min=0), asked[..., None, :].clamp(min=0))
    there = (asked != NOBODY)[..., None, :]
    return there.expand(*asking.shape, -1) if found is None else found & there


def rows_at(x_BHSE: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x that stand at places [b, h, ...] (any row for nobody's): [B, H, ..., E]."""
    batch, heads, length, width = x_BHSE.shape
    firsts = torch.arange(0, batch * heads * length, length, device=places.device).view(batch, heads, 1)
    index = places.clamp(min=0).expand(batch, heads, *places.shape[2:])
    flat = (index.flatten(2) + firsts).flatten()[:, None].expand(-1, width)
    return x_BHSE.flatten(0, 2).gather(0, flat).view(*index.shape, width)


def _groups(view: View) -> Tensor | None:
    """Number the documents of each row from 0, all padding last: [B, K]; None if all keys are real and of one."""
    if view.key_documents is None:
        return None if view.valid is None else (~view.valid).long()
    numbers: Tensor = torch.unique(view.key_documents, return_inverse=True)[1]
    return numbers if view.valid is None else numbers.masked_fill(~view.valid, int(numbers.max()) + 1)


def _order(view: View, groups: Tensor | None, buckets: Tensor | None) -> Tensor:
    """Return which row comes when: [b, h, R, K]."""
    in_order = view.key_documents is None and (view.valid is None or view.right_padded)
    if buckets is None and (groups is None or in_order):
        return torch.arange(view.keys, device=view.device)[None, None, None]
    if buckets is None:
        assert groups is not None
        return groups.sort(dim=1, stable=True).indices[:, None, None]
    if groups is not None:
        buckets = groups[:, None, None] * (int(buckets.max()) + 1) + buckets
    return buckets.sort(dim=-1, stable=True).indices


def _each_in_chunks(groups: Tensor, size: int) -> tuple[Tensor, int]:
    """Return where sorted rows [B, K] of several groups stand so that each group begins a chunk, and the length."""
    places = torch.arange(groups.shape[1], device=groups.device)
    begins = F.pad(groups[:, 1:] != groups[:, :-1], (1, 0))
    ranks = places - torch.where(begins, places, 0).cummax(1).values
    chunk = (ranks % size == 0).cumsum(1) - 1
    return chunk * size + ranks % size, (int(chunk.max()) + 1) * size
