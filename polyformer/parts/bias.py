"""What a position scheme adds to scores, as a kernel asks for it: whole, in blocks, or for any queries and keys.

Queries and keys are named by their places in the row, laid out as `polyformer.parts.rules` says.

Shape letters: B batch, S query length, K key length, H heads, E head width, N distances. A small b is 1 or B.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from polyformer.parts.places import as_scores
from polyformer.parts.view import View


@dataclass
class Bias:
    """A score bias of one attention in one batch.

    Attributes:
        view: whose queries and keys they are.
        sources: what it is worked out from, with gradients where it is trained: never as large as the scores, so that
            a kernel which makes scores again in its backward pass hands on gradients to these.
    """

    view: View
    sources: tuple[Tensor, ...]
    _whole: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def grain(self) -> int:
        """The size of the blocks, counted from the row's left end, in which it is the same."""
        return 1

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the bias of these queries [..., s, 1] for these keys [..., 1, k]: [b, H, ..., s, k]."""
        raise NotImplementedError

    def block(self, queries: range, keys: range) -> Tensor:
        """Return the same for two runs of places: [b, H, s, k]."""
        return self.among(*self.view.pairs(queries, keys))

    def whole(self) -> Tensor:
        """Return the bias of all queries for all keys: [b, H, S, K]; made once."""
        if self._whole is None:
            self._whole = self.block(range(self.view.keys - self.view.queries, self.view.keys), range(self.view.keys))
        return self._whole

    def since(self, first: int) -> Bias:
        """Return the same bias for the view of the keys from a place on (`View.since`); made once."""
        view = self.view
        return view.once(("bias since", first, id(self)), lambda: Later(view.since(first), self.sources, self, first))

    def remade(self, sources: tuple[Tensor, ...]) -> Self:
        """Return the same bias made of other sources."""
        return dataclasses.replace(self, sources=sources)


@dataclass
class ByDistance(Bias):
    """A number for each head and distance; `sources` is a table [H, S + K - 1], from the least distance up.

    So it is worked out S + K - 1 times, not S·K times.
    """

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        (table,) = self.sources
        index = (self.view.apart(queries, keys) + self.view.keys - 1).clamp(0, table.shape[1] - 1)
        return by_head(table, index)

    def block(self, queries: range, keys: range) -> Tensor:
        if self.view.gaps or not queries or not keys:
            return super().block(queries, keys)
        least = keys.start - queries.stop + self.view.keys
        run = self.sources[0][:, least : least + len(queries) + len(keys) - 1]
        return run.unfold(1, len(keys), 1).flip(1)[None]


@dataclass
class ByKey(Bias):
    """A number for each head and key; `sources` is a table [b, H, K]."""

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        (table,) = self.sources
        places = as_scores(keys)
        if len(places) == 1 and places.shape[1] == 1:
            found = table[:, :, places[0, 0]]
        else:
            places = places.expand(max(len(table), len(places)), table.shape[1], *places.shape[2:])
            table = table.expand(len(places), -1, -1)
            found = table.gather(2, places.flatten(2)).view(places.shape)
        return found.expand(*found.shape[:-2], queries.shape[-2], -1)


@dataclass
class ByVector(Bias):
    """What a query makes of its distance to a key, up to `distance`; `sources` is [B, H, S, 2 · distance + 1]."""

    distance: int

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        index = self.view.apart(queries, keys).clamp(-self.distance, self.distance) + self.distance
        return picked(rows_at(self.sources[0], queries, self.view), index)


@dataclass
class ByProduct(Bias):
    """The product of queries with a vector of each distance; `sources` are [B, H, S, E] and [H, S + K - 1, E].

    The products of all queries with all distances would be as large as the scores, so each block makes its own.
    """

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        asking, vectors = self.sources
        index = (self.view.apart(queries, keys) + self.view.keys - 1).clamp(0, vectors.shape[1] - 1)
        least, greatest = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
        rows = rows_at(asking, queries, self.view)
        between = vectors[:, least : greatest + 1].mT
        scores = rows @ between.view(1, len(between), *[1] * (rows.ndim - 4), *between.shape[1:])
        return picked(scores, index - least)


@dataclass
class Later(Bias):
    """Another bias for the keys from a place on only, whose view counts places from there."""

    inner: Bias
    first: int

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.inner.among(queries + self.first, keys + self.first)

    def block(self, queries: range, keys: range) -> Tensor:
        asking, asked = (range(one.start + self.first, one.stop + self.first) for one in (queries, keys))
        return self.inner.block(asking, asked)

    def remade(self, sources: tuple[Tensor, ...]) -> Self:
        return dataclasses.replace(self, sources=sources, inner=self.inner.remade(sources))


def by_head(table_HN: Tensor, index: Tensor) -> Tensor:
    """Look up a column for each head: index [b, h, ..., s, k] -> [b, H, ..., s, k], where h is 1 or H."""
    heads, count = table_HN.shape
    firsts = torch.arange(heads, device=index.device) * count
    index = index + firsts.view(-1, *[1] * (index.ndim - 2))
    return table_HN.reshape(-1).index_select(0, index.flatten()).view(index.shape)


def rows_at(x_BHSN: Tensor, queries: Tensor, view: View) -> Tensor:
    """Return the rows of x that belong to queries [b, h, ..., s, 1]: [B, H, ..., s, N]."""
    rows = as_scores(queries)[..., 0] - (view.keys - view.queries)
    if rows.shape[:2] == (1, 1):
        return x_BHSN[:, :, rows[0, 0]]
    rows = rows.expand(*x_BHSN.shape[:2], *rows.shape[2:])
    index = rows.flatten(2)[..., None].expand(-1, -1, -1, x_BHSN.shape[-1])
    return x_BHSN.gather(2, index).view(*rows.shape, -1)


def picked(scores: Tensor, index: Tensor) -> Tensor:
    """Pick from scores [B, H, ..., s, N] by index [b, h, ..., s, k] -> [B, H, ..., s, k]."""
    return scores.gather(-1, index.expand(*scores.shape[:-1], -1))
