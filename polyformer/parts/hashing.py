"""Reformer's attention: rows are sorted by a hash of their directions, so that those which look alike stand together.

Shape letters: B batch, S length, D width, H heads, E head width, R rounds of hashing, M runs of chunks, N chunks of a
run, C rows of a chunk, W chunks that each looks at, L length filled up to whole chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.attention import Heads
from polyformer.parts.contract import Clause, Differs, Refuses, Term, Within
from polyformer.parts.kernels.chunks import Chunks, Layout, allowed, rows_at
from polyformer.parts.linear import Affine, Linear
from polyformer.parts.part import Part, Slotted
from polyformer.parts.rules import Everyone, Rule
from polyformer.spec import Record, Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow
    from polyformer.parts.view import View

ITSELF = -1e5
"""The score of a row with itself, which counts only where there is nothing else."""

FORBIDDEN = -1e9
"""The score of what a row may not look at. Finite, so that no sum over nothing is NaN."""

SPAN = 2**20
"""Scores to make at a time, so that without gradients no more of them are held."""

Made = tuple[Tensor, ...]


class Hashes(Record):
    """Angular hashing: a vector is turned at random, and its bucket is the axis that it then lies next to.

    `rounds` of hashing find more of what is alike, each sorting by turns of its own (Kitaev et al. 2020, section 2).
    `buckets` is how many there are, or factors that multiply to it: with n₁ · n₂ of them, only n₁ + n₂ products are
    made of a vector. None is a power of 2 near twice the number of chunks, in two factors where that is above `limit`
    (None: twice the size of a chunk).

    Turns are drawn from PyTorch's random state, anew in each pass, or from `seed`, the same for all layers and passes.
    """

    rounds: int = 1
    buckets: tuple[int, ...] | None = None
    limit: int | None = None
    seed: int | None = None

    def check(self) -> None:
        self.require(self.rounds > 0, f"rounds must be at least 1, not {self.rounds}")
        self.require(self.limit is None or self.limit > 1, f"limit must be at least 2, not {self.limit}")
        for count in self.buckets or ():
            self.require(
                count > 0 and count % 2 == 0,
                f"a number of buckets must be even, half of them opposite to the others, not {count}",
            )
        self.require(self.buckets is None or len(self.buckets) > 0, "buckets need at least one factor")
        fits = self.seed is None or 0 <= self.seed < 2**63
        self.require(fits, f"a seed must be between 0 and 2^63, not {self.seed}")

    def factors(self, length: int, size: int) -> tuple[int, ...]:
        """Return the factors of the number of buckets for a length cut into chunks of a size."""
        if self.buckets is not None:
            return self.buckets
        power = (2 * (length // size)).bit_length() - 1
        if 2**power <= (2 * size if self.limit is None else self.limit) or power < 2:
            return (2**power,)
        return (2 ** (power // 2), 2 ** (power - power // 2))

    def turns(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw turns of a shape. In single precision always, so that a model in another one hashes alike."""
        chance = None if self.seed is None else torch.Generator(device).manual_seed(self.seed)
        return torch.randn(shape, generator=chance, device=device, dtype=torch.float32)


class Hashing(Spec):
    """Attention by locality-sensitive hashing: o(LSH(qk(x), v(x))) (Kitaev et al. 2020, section 2).

    Queries and keys are the same vectors, keys at length 1. Rows are sorted by bucket, in each round anew, and cut into
    `chunks`: a row looks at those of its own and of neighbouring ones, whatever bucket they are of, as far as the rule
    `see` allows; at itself only where there is nothing else. Rounds are weighed by the sum of the exponentials of their
    scores. Time grows with n · log n, memory with n · size.

    A row of no more than one chunk looks at all others, without hashing. `dropout` drops weights in training.
    """

    qk: Spec
    v: Spec
    o: Spec
    heads: Heads
    chunks: Chunks
    hashes: Hashes = Hashes()
    see: Rule = Everyone()
    dropout: float = 0.0

    def check(self) -> None:
        heads = self.heads
        self.require(heads.groups == heads.count, "each head hashes its own keys, so that heads can't share them")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        for name in ("qk", "v", "o"):
            linear = getattr(self, name)
            if isinstance(linear, Affine):
                size, does = (linear.inputs, "takes") if name == "o" else (linear.outputs, "gives")
                told = f"{name} {does} {size} values, but {heads.count} heads of width {heads.width} make "
                self.require(size == heads.count * heads.width, f"{told}{heads.count * heads.width}")

    def breaks(self) -> Mapping[Clause, Term]:
        found = dict(self.see.breaks())
        found["cached"] = Refuses("rows share chunks with rows behind them, which are not there yet in a cache")
        why = ""
        if self.hashes.buckets is None:
            why = "how many buckets there are depends on the longest row with its padding"
        if self.chunks.ends == "joined":
            why = "its chunks stand in a circle, whose length is that of the longest row with its padding"
        if why:
            found |= dict.fromkeys(("padded on the right", "padded on the left"), Differs(why))
            if "packed" not in found:
                found["packed"] = Differs(why.replace("longest row with its padding", "row that documents share"))
        if self.hashes.rounds > 1:
            coarse = "rounds in which a row finds only itself are weighed by differences of numbers near 100,000"
            found |= {"precision": Within(1e-2, coarse)}
            found = {"padded on the right": Within(1e-10, coarse), "padded on the left": Within(1e-10, coarse), **found}
        return found

    @classmethod
    def of_width(cls, width: int, heads: Heads, chunks: Chunks, see: Rule, hashes: Hashes | None = None) -> Hashing:
        """Return the published form for a model's width, whose matrices have no bias."""
        inner = heads.count * heads.width
        into = Linear(width, inner, bias=False)
        return cls(into, into, Linear(inner, width, bias=False), heads, chunks, hashes or Hashes(), see)

    def module(self) -> Part:
        return HashingPart(self)


class HashingPart(Slotted):
    """x [B, S, D] -> [B, S, D]."""

    qk: Part
    v: Part
    o: Part

    def __init__(self, spec: Hashing) -> None:
        super().__init__(spec)
        self.heads, self.chunks, self.hashes = spec.heads, spec.chunks, spec.hashes
        self.see, self.dropout = spec.see, spec.dropout

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        qk, v = (
            torch.unflatten(part(x, flow), -1, (self.heads.count, -1)).transpose(1, 2) for part in (self.qk, self.v)
        )
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(v.dtype, torch.float32)
            mixed = self._attend(qk.to(wide), v.to(wide), flow).to(v.dtype)
        return self.o(mixed.transpose(1, 2).flatten(2), flow)

    def _attend(self, qk: Tensor, v: Tensor, flow: Flow) -> Tensor:
        """[B, H, S, E] twice -> [B, H, S, E]."""
        view = flow.view
        if not view.keys:
            return torch.zeros_like(v)
        layout, traced = self._lay(qk, flow), flow.trace is not None and "attention" in flow.trace.wants
        queries = rows_at(qk, layout.rows)
        keys, values = layout.beside(_of_length_1(queries)), layout.beside(rows_at(v, layout.rows))
        together = (queries, keys, values, layout.rows, layout.asked())
        span = max(SPAN // (math.prod(queries.shape[:3]) * queries.shape[4] * keys.shape[4]), 1)
        pieces = zip(*(torch.split(one, span, 3) for one in together), strict=True)
        made = [self._mix(piece, view, traced) for piece in pieces]
        mixed, size, *weights = (torch.cat(one, 3) for one in zip(*made, strict=True))
        rounds = layout.slots.shape[2]
        mixed, size = (_by_row(one.flatten(3, 4), layout.slots, rounds) for one in (mixed, size))
        share = (size - size.logsumexp(2, keepdim=True)).exp()
        empty = size.amax(2) < FORBIDDEN / 2
        if flow.trace is not None and traced:
            shown = _whole(weights[0], share, layout, view).masked_fill(empty, 0.0)
            flow.trace.attention[flow.path + self.slot] = shown
        mixed = mixed[:, :, 0] if rounds == 1 else (mixed * share).sum(2)
        return mixed.masked_fill(empty, 0.0)

    def _mix(self, piece: Made, view: View, traced: bool) -> Made:
        """Attend in some chunks.

        Args:
            piece: queries [B, H, M, N, C, E]; the keys and values that they look at [B, H, M, N, W·C, E]; the places of
                both, without E.
        Returns:
            What is mixed [..., C, E], the logarithm of the sum of exponentials of scores [..., C, 1], and the weights
            [..., C, W·C] if they are to be `traced`.
        """
        q, k, v, asking, asked = piece
        scores = (q @ k.mT).masked_fill_(asking[..., None] == asked[..., None, :], ITSELF)
        scores = scores.masked_fill_(~allowed(self.see, view, asking, asked), FORBIDDEN)
        top = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        size = top + weights.sum(-1, keepdim=True).log()
        part = (top - size).exp()
        mixed = F.dropout(weights, self.dropout, self.training) @ v * part
        return (mixed, size, weights.detach() * part.detach()) if traced else (mixed, size)

    def _lay(self, qk: Tensor, flow: Flow) -> Layout:
        """Sort the rows."""
        view = flow.view
        if not self.chunks.cuts(view.keys):
            return Layout.of(view, self.chunks.within(view.keys))
        factors = self.hashes.factors(self.chunks.filled(view.keys), self.chunks.size)
        shape = (self.heads.count, self.heads.width, self.hashes.rounds, sum(factors) // 2)
        turns = self.hashes.turns(shape, qk.device)  # drawn even where buckets are known, as dropout draws behind it
        buckets = flow.choose(flow.path + self.slot, lambda: _hash(qk.detach(), turns.to(qk.dtype), factors))
        return Layout.of(view, self.chunks, buckets.long())


def _hash(x: Tensor, turns: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Return the bucket of each vector of x [B, H, S, E] in each round: [B, H, R, S]."""
    turned = torch.einsum("bhse,hern->bhrsn", x, turns)
    found, unit = torch.zeros(turned.shape[:-1], dtype=torch.long, device=x.device), 1
    for along, count in zip(torch.split(turned, [count // 2 for count in factors], -1), factors, strict=True):
        found += unit * torch.cat((along, -along), -1).argmax(-1)
        unit *= count
    return found.to(torch.int16 if math.prod(factors) < 2**15 else torch.int32)  # held until gradients are made


def _of_length_1(x: Tensor) -> Tensor:
    """Return x [..., E] at length 1; a small number keeps zeros what they are."""
    length_1: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * x.shape[-1] ** -0.5
    return length_1


def _by_row(x: Tensor, slots: Tensor, rounds: int) -> Tensor:
    """Bring what stands in chunks [B, H, M, N·C, E] back into the order of the rows: [B, H, R, S, E]."""
    batch, heads, width = *x.shape[:2], x.shape[-1]
    slots = slots.expand(batch, heads, -1, -1).flatten(1, 2)
    return torch.unflatten(rows_at(x.reshape(batch, heads * rounds, -1, width), slots), 1, (heads, rounds))


def _whole(weights: Tensor, share: Tensor, layout: Layout, view: View) -> Tensor:
    """Return the weights of all rounds together: [B, H, S, S] of [B, H, M, N, C, W·C] and shares [B, H, R, S, 1]."""
    batch, heads, rounds = share.shape[:3]
    rows = layout.rows.reshape(*layout.rows.shape[:2], rounds, -1).expand(batch, heads, -1, -1)
    found = share[..., 0].gather(-1, rows.clamp(min=0)).view(*weights.shape[:-1], 1)
    return layout.spread(weights * found.detach(), view)
