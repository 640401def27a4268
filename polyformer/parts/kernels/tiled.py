"""Exact softmax attention in blocks of scores, so that memory grows with the length only (FlashAttention).

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, R heads to each of these (H / G), E head width. A
block is of s queries and k keys; N is B · G.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyformer.parts.bias import Bias
from polyformer.parts.dropout import keep_mask
from polyformer.parts.kernels.kernel import Context, Kernel
from polyformer.parts.kernels.softmax import SoftmaxPart
from polyformer.parts.part import Part

ROOM = 2**20
"""Scores that are worked on at once: few enough for the cache, and enough to be worth the calls. Where all heads of a
batch have more, its rows take turns, or else the heads."""

BITS = math.log2(math.e)
"""Scores are kept in bits, 2^(x · BITS) = e^x: powers of 2 take half of the time."""

LOWEST = -1e30
"""The level of no key at all: finite, so that no difference of levels is NaN."""


class Tiled(Kernel):
    """softmax(scale · q kᵀ + bias) v, of which one block of scores is made at a time (Dao et al. 2022; Dao 2023).

    Going through the keys, each query keeps the greatest score so far, the sum of all weights against it, and the
    values mixed by them; a greater score scales both down (online softmax, algorithm 1). The backward pass makes the
    scores again from their logarithmic sum (algorithm 2). Blocks that the rule rules out are skipped, and those that it
    opens need no mask. Every rule and score bias can be had.

    `keys` and `rows` are the sizes of a block; heads that share keys share the rows out among them. What is no larger
    than one block is left to PyTorch's attention. `scale` None is 1/√E; `dropout` drops attention weights in training.
    """

    keys: int = 512
    rows: int = 256
    scale: float | None = None
    dropout: float = 0.0

    def check(self) -> None:
        self.require(min(self.keys, self.rows) > 0, "keys and rows must be at least 1")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def module(self) -> Part:
        return TiledPart(self)


class TiledPart(SoftmaxPart):
    """No weights."""

    def __init__(self, spec: Tiled) -> None:
        super().__init__(spec, spec.scale, spec.dropout)
        self.keys, self.rows = spec.keys, spec.rows

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, _ = qkv
        _, heads, length, width = q.shape
        rows = max(self.rows // (heads // k.shape[1]), 1)
        if length * k.shape[2] <= rows * self.keys:
            return super().attend(qkv, context)
        tiles = Tiles(
            context=dataclasses.replace(context, rule=context.rule.here(context.view), cache=None),
            sizes=(rows, self.keys),
            scale=width**-0.5 if self.scale is None else self.scale,
            dropout=self.dropout if self.training else 0.0,
        )
        return tiled(qkv, tiles)


@dataclass
class Tiles:
    """How one attention is cut into blocks.

    Attributes:
        context: rule, view and bias.
        sizes: queries and keys of a block.
        scale: factor of q kᵀ.
        dropout, seed: the chance that a weight is dropped, and what makes the same masks again.
    """

    context: Context
    sizes: tuple[int, int]
    scale: float
    dropout: float = 0.0
    seed: int = 0

    def cut(self, length: int) -> Iterator[tuple[slice, range, list[range]]]:
        """Yield which rows a block's queries are, their places, and the blocks of keys that they may look at."""
        view, (rows, size) = self.context.view, self.sizes
        past = view.keys - length
        for start in range(0, length, rows):
            at = slice(start, min(start + rows, length))
            queries = range(past + at.start, past + at.stop)
            reach = self.context.rule.reach(view, queries)
            keys = [range(one, min(one + size, reach.stop)) for one in range(reach.start, reach.stop, size)]
            yield at, queries, keys

    def added(self, queries: range, keys: range, like: Tensor) -> Tensor | None:
        """Return what is added to a block's scores in bits, -inf where the rule forbids: [b, 1 or H, s, k] or None."""
        allowed, bias = self.context.view.block(self.context.rule, queries, keys), self.context.bias
        if bias is not None:
            found = bias.block(queries, keys).to(like.dtype) * BITS
            return found if allowed is None else found.masked_fill(~allowed, -torch.inf)
        if allowed is None:
            return None
        return torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, -torch.inf)

    def kept(self, like: Tensor, *block: int) -> Tensor | None:
        """Return what the weights of a block are multiplied by in dropout, the same each time; None without dropout."""
        return keep_mask(like, self.dropout, (self.seed, *block)) if self.dropout else None


@dataclass
class Share:
    """What is worked on at once: all heads, those of one batch row, or those of it that share keys.

    Attributes:
        keys: which of the N.
        batch, heads: which of B and H.
    """

    keys: slice
    batch: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """Return its part of [1 or B, 1 or H, s, k]."""
        return x[self.batch if len(x) > 1 else slice(None), self.heads if x.shape[1] > 1 else slice(None)]


@dataclass
class Bench:
    """Where the scores of one block after another are worked on.

    Attributes:
        tiles: how the attention is cut.
        heads: B, G and R.
        room: one piece of memory as large as a share of a block.
        shares: of the heads, which take turns.
    """

    tiles: Tiles
    heads: tuple[int, int, int]
    room: Tensor
    shares: list[Share]

    @classmethod
    def of(cls, tiles: Tiles, q_BHSE: Tensor, k_BGKE: Tensor) -> Bench:
        """Make room for the blocks of an attention."""
        batch, heads, length, _ = q_BHSE.shape
        groups = k_BGKE.shape[1]
        shared, size = heads // groups, min(tiles.sizes[0], length) * min(tiles.sizes[1], k_BGKE.shape[2])
        options = (batch * groups, groups, 1)
        count = max(next((one for one in options if one * shared * size <= ROOM), 1), 1)
        shares = []
        for first in range(0, batch * groups, count):
            row, group = divmod(first, groups)
            rows = slice(row, row + max(count // groups, 1))
            shares.append(Share(slice(first, first + count), rows, slice(group * shared, (group + count) * shared)))
        return cls(tiles, (batch, groups, shared), q_BHSE.new_empty(count * shared * size), shares)

    def rows(self, x_BHSE: Tensor, at: slice) -> Tensor:
        """Return a block's rows of all heads that share keys behind each other: [N, R·s, E]."""
        batch, groups, shared = self.heads
        return x_BHSE[:, :, at].reshape(batch * groups, shared * (at.stop - at.start), -1)

    def heads_apart(self, x: Tensor) -> Tensor:
        """[N, R·s, E] -> [B, H, s, E]."""
        batch, groups, shared = self.heads
        return x.view(batch, groups * shared, -1, x.shape[-1])

    def parts(self, *each: Tensor) -> list[tuple[Share, list[Tensor]]]:
        """Return what belongs to each share of tensors [N, ...]."""
        return [(share, [one[share.keys] for one in each]) for share in self.shares]

    def scores(self, one: Tensor, other: Tensor, added: Tensor | None, share: Share) -> Tensor:
        """Return a share's [n, R·s, k], one times other [n, k, E] and what is added to it [b, 1 or H, s, k]."""
        shape = (*one.shape[:2], other.shape[1])
        found = torch.bmm(one, other.mT, out=self.room[: math.prod(shape)].view(shape))
        if added is not None:
            self.spread(found).add_(share.of(added))
        return found

    def spread(self, found: Tensor) -> Tensor:
        """A share's [n, R·s, k] -> [b, H or R, s, k]."""
        _, groups, shared = self.heads
        return found.view(max(len(found) // groups, 1), min(len(found), groups) * shared, -1, found.shape[-1])


def tiled(qkv: tuple[Tensor, Tensor, Tensor], tiles: Tiles) -> Tensor:
    """Return the mixed values [B, H, S, E] of q [B, H, S, E], k and v [B, G, K, E], in float32 at least."""
    q, k, v = qkv
    bias = tiles.context.bias
    if tiles.dropout:
        tiles = dataclasses.replace(tiles, seed=int(torch.randint(2**48, ())))
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        given = (one.to(wide) for one in (q, k, v))
        found: Tensor = _apply(tiles, *given, *(() if bias is None else bias.sources))
        return found.to(v.dtype)


def _apply(tiles: Tiles, *tensors: Tensor) -> Tensor:
    """Go through the blocks as they are: a compiler would write the loop out.

    A decorator that says so would import the compiler, for a second and 70 MB, wherever parts are imported.
    """
    walk: Callable[..., Tensor] = OnlineSoftmax.apply
    if torch.compiler.is_compiling():
        walk = torch.compiler.disable(walk)  # type: ignore[no-untyped-call]
    return walk(tiles, *tensors)


class OnlineSoftmax(torch.autograd.Function):
    """(tiles, q, k, v, the sources of the bias) -> mixed values; gradients go to all tensors."""

    @staticmethod
    def forward(ctx: Any, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, *sources: Tensor) -> Tensor:
        bench = Bench.of(tiles, q, k)
        k, v = k.contiguous(), v.contiguous()
        out, sums = torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_zeros(*q.shape[:3], 1)
        for at, queries, keys in tiles.cut(q.shape[2]):
            mixed, total = _forth(bench, bench.rows(q, at) * (tiles.scale * BITS), (k, v), (queries, keys))
            out[:, :, at], sums[:, :, at] = bench.heads_apart(mixed), bench.heads_apart(total)
        bias = tiles.context.bias
        ctx.tiles = dataclasses.replace(
            tiles,
            context=dataclasses.replace(tiles.context, bias=None if bias is None else bias.remade(())),
        )
        ctx.save_for_backward(q, k, v, out, sums, *sources)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, *sources = ctx.saved_tensors
        bias = ctx.tiles.context.bias
        trained = None
        if bias is not None:
            leaves = tuple(
                one.detach().requires_grad_(needed)
                for one, needed in zip(sources, ctx.needs_input_grad[4:], strict=True)
            )
            bias = bias.remade(leaves)
            if any(one.requires_grad for one in leaves):
                trained = Trained(bias, [torch.zeros_like(one) for one in leaves if one.requires_grad])
        tiles = dataclasses.replace(ctx.tiles, context=dataclasses.replace(ctx.tiles.context, bias=bias))
        slopes = _back(tiles, (q, k, v), (slope, sums, (slope * out).sum(-1, keepdim=True)), trained)
        found = iter(() if trained is None else trained.slopes)
        return None, *slopes, *(next(found) if needed else None for needed in ctx.needs_input_grad[4:])


def _forth(
    bench: Bench, q: Tensor, kv: tuple[Tensor, Tensor], places: tuple[range, list[range]]
) -> tuple[Tensor, Tensor]:
    """Return what queries [N, R·s, E] see, [N, R·s, E], and the logarithmic sums of their scores in bits, [N, R·s, 1].

    Both are zero where there is nothing to look at.
    """
    k, v = (one.flatten(0, 1) for one in kv)
    queries, blocks = places
    mixed, total = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(*q.shape[:2], 1)
    top = torch.full_like(total, LOWEST)
    parts = bench.parts(q, k, v, mixed, total, top)
    for keys in blocks:
        here, added = slice(keys.start, keys.stop), bench.tiles.added(queries, keys, q)
        for i, (share, (asking, asked, valued, mixing, summing, highest)) in enumerate(parts):
            weights = bench.scores(asking, asked[:, here], added, share)
            higher = torch.maximum(highest, weights.amax(-1, keepdim=True))
            weights.sub_(higher).exp2_()
            shrunk = highest.sub_(higher).exp2_()
            summing.mul_(shrunk).add_(weights.sum(-1, keepdim=True))
            kept = bench.tiles.kept(weights, i, queries.stop, keys.start)
            if kept is not None:
                weights.mul_(kept)
            mixing.mul_(shrunk).baddbmm_(weights, valued[:, here])
            highest.copy_(higher)
    empty = total == 0
    return mixed.div_(total.masked_fill(empty, 1.0)), top.add_(total.log2()).masked_fill_(empty, 0.0)


@dataclass
class Trained:
    """The gradients of what a bias is made of, as far as they have been added up."""

    bias: Bias
    slopes: list[Tensor]

    def collect(self, queries: range, keys: range, slope: Tensor) -> None:
        """Hand on the gradients of a block's scores [b, H, s, k]."""
        with torch.enable_grad():
            made = self.bias.block(queries, keys)
        leaves = [one for one in self.bias.sources if one.requires_grad]
        found = torch.autograd.grad(made, leaves, slope.sum_to_size(made.shape).to(made.dtype))
        for one, more in zip(self.slopes, found, strict=True):
            one.add_(more)


def _back(
    tiles: Tiles,
    qkv: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor],
    trained: Trained | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    Args:
        rows: of each query its gradient [B, H, S, E], its logarithmic sum [B, H, S, 1], and its gradient times its
            values, summed [B, H, S, 1].
        trained: takes what the bias gets.
    """
    q, k, v = qkv
    bench, other = Bench.of(tiles, q, k), Bench.of(tiles, q, k)
    keyed, valued = k.flatten(0, 1), v.flatten(0, 1)
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(keyed), torch.zeros_like(valued)
    for at, queries, blocks in tiles.cut(q.shape[2]):
        asking = bench.rows(q, at) * (tiles.scale * BITS)
        slope, sums, whole = (bench.rows(one, at) for one in rows)
        d_asking = torch.zeros_like(asking)
        parts = bench.parts(asking, keyed, valued, slope, sums, whole, d_asking, d_k, d_v)
        for keys in blocks:
            here, added = slice(keys.start, keys.stop), tiles.added(queries, keys, q)
            changes = None if trained is None else q.new_empty(*q.shape[:2], len(queries), len(keys))
            for i, (share, (q_, k_, v_, slope_, sums_, whole_, d_q_, d_k_, d_v_)) in enumerate(parts):
                weights = bench.scores(q_, k_[:, here], added, share).sub_(sums_).exp2_()
                change = other.scores(slope_, v_[:, here], None, share)
                kept = tiles.kept(weights, i, queries.stop, keys.start)
                if kept is not None:
                    change.mul_(kept)
                change.sub_(whole_).mul_(weights)
                d_v_[:, here].baddbmm_((weights if kept is None else weights.mul_(kept)).mT, slope_)
                d_q_.baddbmm_(change, k_[:, here])
                d_k_[:, here].baddbmm_(change.mT, q_)
                if changes is not None:
                    changes[share.batch, share.heads] = bench.spread(change)
            if trained is not None and changes is not None:
                trained.collect(queries, keys, changes)
        d_q[:, :, at] = bench.heads_apart(d_asking.mul_(tiles.scale))
    return d_q, d_k.div_(BITS).view_as(k), d_v.view_as(v)
