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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.kernels.kernel import Context, rules_within
from polyformer.parts.rules import Causal, Everyone, SameDocument

CHUNK = 64
"""Rows of a chunk. With heads of this width, the work within chunks is as much as that between them."""

SPAN = 2**20
"""Elements of queries to work on at a time. For tensors made of many more, the system hands out fresh memory each time,
page by page, and a row then costs up to twice as much."""

LOWEST = -1e30
"""The level of no key at all: finite, so that no difference of levels is NaN."""

Weigh = Callable[[Tensor], Tensor]


@dataclass
class Terms:
    """What is summed.

    Attributes:
        features: makes of queries or keys [B, G, S, ...], which are the rows `at` of all new ones, what is multiplied,
            [B, G, S, F], and levels [b, g, S], which are finite, have no gradient, and don't matter for queries.
        name: what the part is called in errors.
        chunk: rows of a chunk.
        rate: [G], above 0; a key that is 1 lower counts e^rate times less. None is 1.
    """

    features: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    name: str
    chunk: int = CHUNK
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

    @classmethod
    def of(cls, k: Tensor, v: Tensor, a: Tensor, weigh: Weigh) -> Sums:
        """Return the sums over keys [..., C, F] and values [..., C, E] of levels [..., C]."""
        top = a.amax(-1).clamp(min=LOWEST)
        return cls(k.mT @ (v * weigh(a - top[..., None])[..., None]), top)

    def then(self, more: Sums, weigh: Weigh, kept: Tensor | None = None) -> Sums:
        """Return the sums over these keys and more; where not `kept` (boolean [b, g]), over the others only."""
        own = self.top if kept is None else self.top.masked_fill(~kept, -torch.inf)
        top = torch.maximum(own, more.top)
        ours, theirs = (weigh(one - top)[..., None, None] for one in (own, more.top))
        return Sums(self.total * ours + more.total * theirs, top)


def weighted_sums(qkv: tuple[Tensor, Tensor, Tensor], terms: Terms, context: Context) -> Tensor:
    """Return Σ w_ij (q_i · k_j) v_j: [B, H, S, E] for q [B, H, S, ...], k [B, G, K, ...] and v [B, G, K, E].

    Where the context has a cache, that holds the sums over earlier keys, and k and v are those of new tokens only.

    Args:
        qkv: in float32 or wider; sums in half precision would forget.
    Raises:
        SpecError: a rule other than `Everyone`, `Causal` and `SameDocument`, a score bias, or a document that doesn't
            stand in one piece.
    """
    rules, view, cache = rules_within(context, terms.name, Everyone, Causal, SameDocument), context.view, context.cache
    q, k, v = qkv
    batch, groups, new = k.shape[:3]
    if not new:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    causal, documents = Causal() in rules, view.pieces if SameDocument() in rules else None
    past = view.keys - new
    valid = None if view.valid is None else view.valid[:, None, past:]
    size = new if documents is not None and not causal else _span(q, terms.chunk)  # such rows look ahead

    def asked() -> Iterator[Tensor]:
        for one, at in _spans(q, size):
            yield torch.unflatten(terms.features(one, at)[0], 1, (groups, -1))

    def told() -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
        for (key, at), (value, _) in zip(_spans(k, size), _spans(v, size), strict=True):
            made, levels = terms.features(key, at)
            yield made, value, levels if valid is None else levels.masked_fill(~valid[..., at], -torch.inf), at

    held = None if cache is None else cache.states.get(context.slot)
    sums, found = None if held is None else Sums(*held), list[Tensor]()
    if documents is None and (new == 1 or not causal):
        for key, value, levels, _ in told():
            more = Sums.of(key, value, levels, terms.weigh)
            sums = more if sums is None else sums.then(more, terms.weigh)
        assert sums is not None
        found = [torch.unflatten(one.flatten(2, 3) @ sums.total, 2, one.shape[2:4]) for one in asked()]
    else:
        if documents is None:
            documents = torch.zeros(1, view.keys, dtype=torch.long, device=q.device)
        for one, (key, value, levels, at) in zip(asked(), told(), strict=True):
            own = documents[:, max(past + at.start - 1, 0) : past + at.stop]
            chunks = _Chunks.of((key, value, levels), own, min(terms.chunk, new))
            out, sums = chunks.attend(one, causal, chunks.nothing() if sums is None else sums, terms.weigh)
            found.append(out)
    if cache is not None and sums is not None:
        cache.states[context.slot] = (sums.total, sums.top.expand(batch, -1))
    return torch.cat(found, 3).flatten(1, 2)


def _span(q: Tensor, chunk: int) -> int:
    """Return how many rows, all of them whole chunks, to work on at a time."""
    return chunk * max(SPAN // max(chunk * q[:, :, :1].numel(), 1), 1)


def _spans(x: Tensor, size: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield `size` rows of x [B, H, S, E] at a time, and which they are."""
    for i, piece in enumerate(torch.split(x, size, 2)):  # whose gradients are joined once, unlike those of slices
        yield piece, slice(i * size, i * size + piece.shape[2])


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
    def of(cls, kva: tuple[Tensor, Tensor, Tensor], documents: Tensor, size: int) -> _Chunks:
        """Cut keys, values and levels, whose documents [b, ...] these are, perhaps with that of the row before."""
        k, v, a = kva
        start = documents.shape[1] - k.shape[2]
        own = documents[:, start:]
        own = torch.cat((own, own[:, -1:].expand(-1, -own.shape[1] % size)), 1)
        own = torch.unflatten(own, 1, (-1, size))[:, None]
        before = torch.cat((documents[:, None, max(start - 1, 0), None], own[:, :, :-1, -1]), -1)
        return cls(_cut(k, size), _cut(v, size), _cut(a[..., None], size, -torch.inf)[..., 0], own, before)

    def nothing(self) -> Sums:
        """Return the sums over no keys such as these."""
        shape = (*self.keys.shape[:2], self.keys.shape[-1], self.values.shape[-1])
        return Sums(self.values.new_zeros(shape), self.levels.new_full(self.levels.shape[:2], LOWEST))

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
        outside = [earlier] if causal else [earlier, self._later(weigh)]
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
        own = Sums.of(self.keys, self.values, levels, weigh)
        held, goes_on = [], self.before == last
        for total, top, kept in zip(own.total.unbind(2), own.top.unbind(2), goes_on.unbind(2), strict=True):
            held.append(past)
            past = past.then(Sums(total, top), weigh, kept)
        top = torch.stack([one.top.expand_as(past.top) for one in held], 2)[..., None]
        top = top.masked_fill(self.documents != self.before[..., None], -torch.inf)
        return Sums(torch.stack([one.total for one in held], 2), top), past

    def _later(self, weigh: Weigh) -> Sums:
        """Return what rows see of the keys behind their chunk."""
        found, _ = self.turned().carried(self.nothing(), weigh)
        return Sums(found.total.flip(2), found.top.flip(2, 3))


def _cut(x: Tensor, size: int, filling: float = 0.0) -> Tensor:
    """[..., S, W] -> [..., N, C, W], filled up where the last chunk isn't full."""
    lack = -x.shape[-2] % size
    x = F.pad(x, (0, 0, 0, lack), value=filling) if lack else x
    return torch.unflatten(x, -2, (-1, size))
