"""Weighted sums over keys in linear time and memory: what linear attention, Performers and retention are made of.

A query's answer is Σ w_ij (q_i · k_j) v_j over the keys that it may see, w_ij = exp(rate · (a_j - m_i)): a_j is a key's
level, and m_i the highest one that the query sees. So no weight is above 1, whatever the levels are. Where an answer is
a quotient of two such sums, as a Performer's is, m_i cancels out; where levels are places, w_ij is the decay of
retention, γ^(i - j).

Within a chunk of rows all pairs are worked out, and what lies outside of it is one matrix Σ w_j k_j v_jᵀ. A chunk as
long as the text is the quadratic form, chunks of one row are the recurrent form; they differ in rounding only.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, R heads to each of these (H / G), F width of
queries and keys, E width of values, N chunks, C rows of a chunk. A small b or g is 1 where all rows or heads are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.kernels.kernel import Context, rules_within
from polyformer.parts.rules import Causal, Everyone, SameDocument

CHUNK = 64
"""Rows of a chunk. With heads of this width, the work within chunks is as much as that between them."""

LOWEST = -1e30
"""The level of no key at all: finite, so that no difference of levels is NaN."""

Weigh = Callable[[Tensor], Tensor]


@dataclass
class Levels:
    """How much keys count.

    Attributes:
        keys: [b, g, K], finite; without gradient.
        rate: [G], above 0; a key that is 1 lower counts e^rate times less. None is 1.
    """

    keys: Tensor
    rate: Tensor | None = None

    def weigh(self, apart: Tensor) -> Tensor:
        """Return the weights for differences of levels [b, g, ...], none of which is above 0."""
        if self.rate is None:
            return apart.exp()
        return (apart * self.rate.view(-1, *[1] * (apart.ndim - 2))).exp()


@dataclass
class Sums:
    """What some keys amount to: Σ w_j k_j v_jᵀ, weighed against the highest level of them.

    Attributes:
        total: [B, G, F, E].
        top: [b, g], that level.
    """

    total: Tensor
    top: Tensor

    def then(self, more: Sums, weigh: Weigh, kept: Tensor | None = None) -> Sums:
        """Return the sums over these keys and more; where not `kept` (boolean [b, g]), over the others only."""
        own = self.top if kept is None else self.top.masked_fill(~kept, -torch.inf)
        top = torch.maximum(own, more.top)
        ours, theirs = (weigh(one - top)[..., None, None] for one in (own, more.top))
        return Sums(self.total * ours + more.total * theirs, top)


def weighted_sums(
    qkv: tuple[Tensor, Tensor, Tensor], levels: Levels, context: Context, name: str, chunk: int = CHUNK
) -> Tensor:
    """Return Σ w_ij (q_i · k_j) v_j: [B, H, S, E] for q [B, H, S, F], k [B, G, K, F] and v [B, G, K, E].

    Where the context has a cache, that holds the sums over earlier keys, and k and v are those of new tokens only.

    Args:
        qkv: in float32 or wider; sums in half precision would forget.
        name: what the part is called in errors.
        chunk: rows of a chunk.
    Raises:
        SpecError: a rule other than `Everyone`, `Causal` and `SameDocument`, a score bias, or a document that doesn't
            stand in one piece.
    """
    rules, view, cache = rules_within(context, name, Everyone, Causal, SameDocument), context.view, context.cache
    q, k, v = qkv
    batch, groups, new, width = k.shape
    if not new:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    q, a = torch.unflatten(q, 1, (groups, -1)), levels.keys
    if view.valid is not None:
        a = a.masked_fill(~view.valid[:, None, view.keys - new :], -torch.inf)
    nothing = (v.new_zeros(batch, groups, width, v.shape[-1]), a.new_full(a.shape[:2], LOWEST))
    sums = Sums(*(nothing if cache is None else cache.states.get(context.slot, nothing)))
    documents = view.pieces if SameDocument() in rules else None
    if documents is not None or (Causal() in rules and new > 1):
        if documents is None:
            documents = torch.zeros(1, view.keys, dtype=torch.long, device=q.device)
        keys = _Chunks.of(k, v, a, documents, min(chunk, new))
        out, sums = keys.attend(q, Causal() in rules, sums, levels.weigh)
    else:
        top = a.amax(-1).clamp(min=LOWEST)
        total = k.mT @ (v * levels.weigh(a - top[..., None])[..., None])
        sums = sums.then(Sums(total, top), levels.weigh)
        out = torch.unflatten(q.flatten(2, 3) @ sums.total, 2, q.shape[2:4])
    if cache is not None:
        cache.states[context.slot] = (sums.total, sums.top.expand(batch, -1))
    return out.flatten(1, 2)


@dataclass
class _Chunks:
    """Keys cut into chunks, the last one filled up with keys that nobody sees.

    Attributes:
        keys, values: [B, G, N, C, F] and [B, G, N, C, E].
        levels: [b, g, N, C], -inf where nobody looks.
        documents: [b, 1, N, C], the number of each row's document.
        before: [b, 1, N], that of the row before each chunk; where there is none, that of its first row.
    """

    keys: Tensor
    values: Tensor
    levels: Tensor
    documents: Tensor
    before: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, a: Tensor, documents: Tensor, size: int) -> _Chunks:
        """Cut keys, values and levels of the last of the rows whose documents [b, ...] these are."""
        start = documents.shape[1] - k.shape[2]
        own = documents[:, start:]
        own = torch.cat((own, own[:, -1:].expand(-1, -own.shape[1] % size)), 1)
        own = torch.unflatten(own, 1, (-1, size))[:, None]
        before = torch.cat((documents[:, None, max(start - 1, 0), None], own[:, :, :-1, -1]), -1)
        return cls(_cut(k, size), _cut(v, size), _cut(a[..., None], size, -torch.inf)[..., 0], own, before)

    def turned(self) -> _Chunks:
        """Return the same keys from the last to the first."""
        documents = self.documents.flip(2, 3)
        before = torch.cat((documents[:, :, :1, 0], documents[:, :, :-1, -1]), -1)
        keys, values, levels = (one.flip(2, 3) for one in (self.keys, self.values, self.levels))
        return _Chunks(keys, values, levels, documents, before)

    def attend(self, q: Tensor, causal: bool, past: Sums, weigh: Weigh) -> tuple[Tensor, Sums]:
        """Return what queries [B, G, R, S, F] see: [B, G, R, S, E]; and the sums for those to come."""
        shared, size = q.shape[2], self.keys.shape[3]
        rows = _cut(q, size).transpose(2, 3)
        seen = self.documents[..., :, None] == self.documents[..., None, :]
        inside = self.levels[..., None, :].masked_fill(~(seen.tril() if causal else seen), -torch.inf)
        earlier, sums = self.carried(past, weigh)
        outside = [earlier] if causal else [earlier, self._later(past, weigh)]
        top = inside.amax(-1).clamp(min=LOWEST)
        for one in outside:
            top = torch.maximum(top, one.top)
        scores = torch.unflatten(rows.flatten(3, 4) @ self.keys.mT, 3, (shared, size))
        out = (scores * weigh(inside - top[..., None])[:, :, :, None]).flatten(3, 4) @ self.values
        for one in outside:
            out = out + (rows * weigh(one.top - top)[:, :, :, None, :, None]).flatten(3, 4) @ one.total
        out = torch.unflatten(out, 3, (shared, size)).transpose(2, 3).flatten(3, 4)
        return out[..., : q.shape[3], :], sums

    def carried(self, past: Sums, weigh: Weigh) -> tuple[Sums, Sums]:
        """Return what rows see of the keys before their chunk, and the sums behind the last chunk.

        The first are a total [B, G, N, F, E] for each chunk and a top [b, g, N, C] for each row: -inf where the row is
        of another document than the keys that the total is of.
        """
        last = self.documents[..., -1]
        levels = self.levels.masked_fill(self.documents != last[..., None], -torch.inf)
        tops = levels.amax(-1).clamp(min=LOWEST)
        totals = self.keys.mT @ (self.values * weigh(levels - tops[..., None])[..., None])
        held, goes_on = [], self.before == last
        for total, top, kept in zip(totals.unbind(2), tops.unbind(2), goes_on.unbind(2), strict=True):
            held.append(past)
            past = past.then(Sums(total, top), weigh, kept)
        top = torch.stack([one.top.expand_as(past.top) for one in held], 2)[..., None]
        top = top.masked_fill(self.documents != self.before[..., None], -torch.inf)
        return Sums(torch.stack([one.total for one in held], 2), top), past

    def _later(self, past: Sums, weigh: Weigh) -> Sums:
        """Return what rows see of the keys behind their chunk."""
        nothing = Sums(torch.zeros_like(past.total), torch.full_like(past.top, LOWEST))
        found, _ = self.turned().carried(nothing, weigh)
        return Sums(found.total.flip(2), found.top.flip(2, 3))


def _cut(x: Tensor, size: int, filling: float = 0.0) -> Tensor:
    """[..., S, W] -> [..., N, C, W], filled up where the last chunk isn't full."""
    lack = -x.shape[-2] % size
    x = F.pad(x, (0, 0, 0, lack), value=filling) if lack else x
    return torch.unflatten(x, -2, (-1, size))
