"""Softmax attention of blocks of queries to what each of them gathers, a few blocks at a time.

What was gathered is forgotten and gathered again for the gradients, so that no more than the rows themselves is kept.

Shape letters: B batch, H heads, E head width, C rows of a block, K' blocks of keys, N blocks of queries, M how many
blocks of keys each of these gathers, U heads that gather for themselves, R heads that ask the same keys, g single keys
beside the blocks, T keys gathered in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SPAN = 2**20
"""Elements to gather at a time. For tensors made of many more, the system hands out fresh memory each time."""


@dataclass
class Gather:
    """Which blocks of keys, of all heads alike or of each by itself, are gathered for which blocks of queries.

    Attributes:
        index: numbers of blocks [1 or H, N, M].
        heads, groups: H, and how many key/value heads there are.
        block: C.
    """

    index: Tensor
    heads: int
    groups: int
    block: int

    @property
    def alike(self) -> bool:
        """Whether all heads gather the same."""
        return len(self.index) == 1

    @property
    def asking(self) -> int:
        """How many heads gather for themselves: U."""
        return self.groups if self.alike else self.heads

    def source(self, x: Tensor) -> Tensor:
        """Lay keys or values out in blocks: [B, G, K, E] -> [B, K', C, G, E] or, by head, [B, G · K', C, E]."""
        x = filled(x, self.block)
        if self.alike:
            return torch.unflatten(x.transpose(1, 2), 1, (-1, self.block))
        return torch.unflatten(x, 2, (-1, self.block)).flatten(1, 2)

    def flat(self, rows: slice, blocks: int) -> Tensor:
        """Return the places in a source of what some blocks of queries gather, one behind the other."""
        if self.alike:
            return self.index[0, rows].flatten()
        heads = torch.arange(self.heads, device=self.index.device) // (self.heads // self.groups)
        return (self.index[:, rows].transpose(0, 1) + (heads * blocks)[:, None]).flatten()

    def take(self, source: Tensor, rows: slice, beside: Tensor) -> Tensor:
        """Gather, with the same keys `beside` for all: [B, U, g, E] -> [B · n, U, T, E]."""
        batch, width = len(source), source.shape[-1]
        taken = source.index_select(1, self.flat(rows, source.shape[1] // (1 if self.alike else self.groups)))
        count = len(self.index[0, rows])
        if self.alike:
            taken = taken.view(batch * count, -1, self.groups, width).transpose(1, 2)
        else:
            taken = taken.view(batch * count, self.heads, -1, width)
        if not beside.shape[2]:
            return taken
        return torch.cat((taken, beside[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)), 2)

    def give(self, found: Tensor, to: Tensor, rows: slice) -> Tensor:
        """Add up gradients of what was gathered [B · n, U, T, E] in those of its source; return those of `beside`."""
        batch = len(to)
        inner = self.index.shape[2] * self.block
        own = found[:, :, :inner]
        own = own.transpose(1, 2) if self.alike else own
        flat = self.flat(rows, to.shape[1] // (1 if self.alike else self.groups))
        to.index_add_(1, flat, own.reshape(batch, len(flat), *to.shape[2:]))
        return torch.unflatten(found[:, :, inner:], 0, (batch, -1)).sum(1)

    def slabs(self, batch: int, keys: int, width: int) -> Iterator[slice]:
        """Yield runs of blocks of queries, each of which gathers about `SPAN` elements."""
        count = self.index.shape[1]
        step = max(SPAN // max(batch * self.asking * keys * width, 1), 1)
        return (slice(i, min(i + step, count)) for i in range(0, count, step))


def attend_gathered(
    q: Tensor,
    sources: tuple[Tensor, Tensor],
    beside: tuple[Tensor, Tensor],
    gather: Gather,
    mask: Tensor | None,
    settings: tuple[float, float],
) -> Tensor:
    """Return softmax(scale · q kᵀ + mask) v over what is gathered.

    A mask with gradients, dropout and other devices go through SDPA itself, which keeps what was gathered.

    Args:
        q: [B, N, U, R · C, E].
        sources: keys and values, as `Gather.source` lays them out.
        beside: further keys and values, which all queries look at: [B, U, g, E].
        mask: what is added to the scores, [b, N, u, R · C or 1, T] with a small b and u of 1 where all are alike, -inf
            where nothing is looked at, though not in a whole row.
        settings: scale, and dropout of the weights.
    """
    scale, dropout = settings
    if q.device.type != "cpu" or dropout or (mask is not None and mask.requires_grad):
        everything = slice(0, q.shape[1])
        k, v = (gather.take(one, everything, two) for one, two in zip(sources, beside, strict=True))
        out = F.scaled_dot_product_attention(
            q.flatten(0, 1), k, v, _laid(mask, everything, len(q)), dropout, scale=scale
        )
        return torch.unflatten(out, 0, q.shape[:2])
    found: Tensor = _Attend.apply(q, *sources, *beside, How(gather, mask, scale))  # type: ignore[no-untyped-call]
    return found


@dataclass
class How:
    """What is the same for all slabs: what is gathered, the mask [b, N, u, R · C or 1, T], and the scores' scale."""

    gather: Gather
    mask: Tensor | None
    scale: float


class _Attend(torch.autograd.Function):
    """Slab by slab, through the very operators that SDPA chooses on a CPU, whose backward pass wants no scores.

    Sources are put in one piece of memory, or PyTorch would copy all of one each time that something is gathered from
    it; but the copies aren't kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_beside: Tensor, v_beside: Tensor, how: How) -> Tensor:
        gather, mask, scale = how.gather, how.mask, how.scale
        out = torch.empty_like(q)
        sums = []
        keyed, valued = k.contiguous(), v.contiguous()
        for rows in gather.slabs(len(q), gather.index.shape[2] * gather.block, q.shape[-1]):
            keys, values = gather.take(keyed, rows, k_beside), gather.take(valued, rows, v_beside)
            asking = q[:, rows].flatten(0, 1)
            found, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                asking, keys, values, attn_mask=_laid(mask, rows, len(q)), scale=scale
            )
            out[:, rows] = torch.unflatten(found, 0, (len(q), -1))
            sums.append(logs)
        ctx.save_for_backward(q, k, v, k_beside, v_beside, out, *sums)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_beside, v_beside, out, *sums = ctx.saved_tensors
        (slope,), gather = slopes, ctx.how.gather
        found = [torch.zeros_like(one) for one in (q, k, v, k_beside, v_beside)]
        slabs = gather.slabs(len(q), gather.index.shape[2] * gather.block, q.shape[-1])
        keyed, valued = k.contiguous(), v.contiguous()
        for rows, logs in zip(slabs, sums, strict=True):
            keys, values = gather.take(keyed, rows, k_beside), gather.take(valued, rows, v_beside)
            asking, answer, wanted = (one[:, rows].flatten(0, 1) for one in (q, out, slope))
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                wanted,
                asking,
                keys,
                values,
                answer,
                logs,
                0.0,
                False,
                attn_mask=_laid(ctx.how.mask, rows, len(q)),
                scale=ctx.how.scale,
            )
            found[0][:, rows] = torch.unflatten(grads[0], 0, (len(q), -1))
            found[3] += gather.give(grads[1], found[1], rows)
            found[4] += gather.give(grads[2], found[2], rows)
        return (*found, None)


def _laid(mask: Tensor | None, rows: slice, batch: int) -> Tensor | None:
    """Return what a mask [b, N, u, R · C or 1, T] says of some blocks of queries: [B · n, u, R · C or 1, T]."""
    if mask is None:
        return None
    return mask[:, rows].expand(batch, -1, -1, -1, -1).flatten(0, 1)


def filled(x: Tensor, block: int) -> Tensor:
    """[B, G, K, E], with zeros behind up to a multiple of the block."""
    lack = -x.shape[2] % block
    return F.pad(x, (0, 0, 0, lack)) if lack else x
