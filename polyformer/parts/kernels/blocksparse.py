"""Exact softmax attention that touches only the blocks of keys which a rule lets a block of queries look at.

Shape letters: B batch, S rows, H heads, G key/value heads, E head width, C rows of a block, N blocks of queries that
look at few blocks, M how many of these they look at, U heads that gather for themselves, R heads that ask the same
keys, g single keys beside the blocks, T keys gathered for a block in all. A small b or h is 1 where all rows or heads
are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.blocks import needed, scattered
from polyformer.parts.kernels.gathered import Gather, attend_gathered, filled
from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart
from polyformer.parts.kernels.softmax import Softmax, exact_on_cpu
from polyformer.parts.part import Part
from polyformer.parts.places import at
from polyformer.parts.rules import Rule
from polyformer.parts.view import View

FULL = 0.5
"""The share of all pairs of blocks from which on all pairs of rows are worked out at once."""


class BlockSparse(Kernel):
    """softmax(scale · q kᵀ + bias) v, worked out in blocks of `block` rows (Zaheer et al. 2020, section 2).

    Each block of queries gathers those blocks of keys that the rule lets any of its queries look at; what the rule
    forbids within them is masked. So time and memory grow with the number of such pairs of blocks. Blocks of queries
    that look at (nearly) all keys, as global ones do, are worked out apart, so that the others stay narrow. A row whose
    length is no multiple of the block is filled up inside.

    `full` takes over where there is little to leave out: in short rows, under a rule that lets everyone look at
    everyone, and for the few new queries of a cached pass. Its `scale` is that of all rows; `dropout` is for the sparse
    form only, since BigBird's published models have none there, but have it in their full form.
    """

    block: int = 64
    full: Softmax = Softmax()
    dropout: float = 0.0

    def check(self) -> None:
        self.require(self.block > 0, f"block must be at least 1, not {self.block}")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def module(self) -> Part:
        return BlockSparsePart(self)


@dataclass
class Plan:
    """A rule lowered to blocks for one batch; layers share it.

    Attributes:
        narrow, wide: numbers of the blocks of queries that are worked out with what they gather, and with all keys.
        blocks: numbers of the blocks of keys that each narrow one gathers [h, N, M].
        beside: places of single keys that are gathered for all queries [b, g].
        queries, keys: places of the narrow queries [1, 1, N, C, 1], and of what they gather [b, h, N, 1, T].
        allowed: what they may look at, boolean [b, h, N, C or 1, T]; None if all of it.
        empty: queries that may look at nothing, boolean [b, h, N, C or 1, 1], which `allowed` opens; None if none.
    """

    narrow: Tensor
    wide: Tensor
    blocks: Tensor
    beside: Tensor
    queries: Tensor
    keys: Tensor
    allowed: Tensor | None
    empty: Tensor | None


def plan_of(rule: Rule, view: View, size: int) -> Plan | None:
    """Lower a rule to blocks of `size`; None where there is little to leave out."""
    if view.queries != view.keys or not view.keys or rule.grain == 0:
        return None
    pairs = needed(rule, view, size)
    counts, count = pairs.sum(-1).amax(0), pairs.shape[-1]
    width = _narrowest(counts)
    few = counts <= width
    if int(torch.where(few, width, count).sum()) > FULL * count * count:
        return None
    narrow, wide = few.nonzero()[:, 0], (~few).nonzero()[:, 0]
    there, blocks = pairs[:, narrow].int().topk(width, -1)
    beside = scattered(rule, view)
    if beside is None:
        beside = torch.zeros(1, 0, dtype=torch.long, device=view.device)
    inner = torch.arange(size, device=view.device)
    queries = (narrow[:, None] * size + inner)[None, None, ..., None]
    keys = (blocks[..., None] * size + inner).flatten(-2)[None, :, :, None]
    real = there.bool().repeat_interleave(size, -1)[None, :, :, None] & (keys < view.keys)
    queries, keys = queries.clamp(max=view.keys - 1), keys.clamp(max=view.keys - 1)
    if beside.shape[1]:
        real, keys = _with_others((real, keys), beside, view.keys)
    whole = rule.grain > 1 and rule.grain % size == 0
    allowed = view.valid_at(keys) if whole else view.among(rule, queries, keys)
    allowed = real if allowed is None else allowed & real
    if bool(allowed.all()):
        return Plan(narrow, wide, blocks, beside, queries, keys, None, None)
    empty = ~allowed.any(-1, keepdim=True)
    if not bool(empty.any()):
        return Plan(narrow, wide, blocks, beside, queries, keys, allowed, None)
    return Plan(narrow, wide, blocks, beside, queries, keys, allowed | empty, empty)


def _narrowest(counts: Tensor) -> int:
    """Return up to how many blocks are gathered, so that what is worked out in all is least: counts [blocks]."""
    ordered = counts.clamp(min=1).sort().values
    upto = torch.arange(1, len(ordered) + 1, device=counts.device)
    costs = ordered * upto + len(ordered) * (len(ordered) - upto)
    return int(ordered[int(costs.argmin())])


def _with_others(known: tuple[Tensor, Tensor], beside: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Put single keys behind those of blocks, which are then no longer there in their blocks, where they'd count twice.

    Args:
        known: which keys of blocks are there, and their places: [1, h, N, 1, M · C] each.
        beside: places [b, g], -1 for none.
        length: K.
    """
    real, keys = known
    others = beside[:, None, None, None]
    again = torch.zeros(len(beside), length + 1, dtype=torch.bool, device=beside.device)
    again.scatter_(1, beside.where(beside >= 0, length), True)
    shape = (len(beside), *keys.shape[1:4], -1)
    real = torch.cat(((real & ~at(again, keys)).expand(shape), (others >= 0).expand(shape)), -1)
    return real, torch.cat((keys.expand(shape), others.clamp(min=0).expand(shape)), -1)


class BlockSparsePart(KernelPart):
    """Gathers, and leaves the rest to the implementation that SDPA chooses."""

    full: KernelPart

    def __init__(self, spec: BlockSparse) -> None:
        super().__init__(spec)
        self.block, self.scale, self.dropout = spec.block, spec.full.scale, spec.dropout

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        view, rule = context.view, context.rule.here(context.view)
        plan = view.once(("plan", rule, self.block), lambda: plan_of(rule, view, self.block))
        if plan is None:
            return self.full.attend(qkv, context)
        with exact_on_cpu(qkv[0]) as widen:
            wider = (widen(qkv[0]), widen(qkv[1]), widen(qkv[2]))
            out = self.narrow(wider, plan, context)
            if len(plan.wide):
                out = torch.cat((out, self.wide(wider, plan, context)), 2)
                out = out.index_select(2, torch.cat((plan.narrow, plan.wide)).argsort())
        return out.flatten(2, 3)[:, :, : view.queries].to(qkv[0].dtype)

    def narrow(self, qkv: tuple[Tensor, Tensor, Tensor], plan: Plan, context: Context) -> Tensor:
        """Return the answers of blocks that look at few keys: [B, H, N, C, E]."""
        q, k, v = qkv
        gather = Gather(plan.blocks, q.shape[1], k.shape[1], self.block)
        shared = q.shape[1] // gather.asking
        q = torch.unflatten(filled(q, self.block), 2, (-1, self.block)).index_select(2, plan.narrow)
        q = torch.unflatten(q, 1, (-1, shared)).permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        if context.bias is None:
            key = ("mask of a plan", context.rule, self.block, shared, q.dtype)
            mask = context.view.once(key, lambda: self.mask(plan, context, shared, q))
        else:
            mask = self.mask(plan, context, shared, q)
        beside = (_beside(k, plan, gather), _beside(v, plan, gather))
        out = attend_gathered(q, (gather.source(k), gather.source(v)), beside, gather, mask, self.settings(q))
        out = torch.unflatten(out, 3, (shared, self.block)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        return out if plan.empty is None else out.masked_fill(plan.empty, 0.0)

    def mask(self, plan: Plan, context: Context, shared: int, like: Tensor) -> Tensor | None:
        """Return what is added to the scores of narrow queries: [b, N, u, R · C or 1, T], or None for nothing."""
        allowed = plan.allowed
        if context.bias is None:
            if allowed is None:
                return None
            found = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, -torch.inf)
        else:
            alike = context.bias.grain > 1 and context.bias.grain % self.block == 0
            queries = plan.queries[..., :1, :] if alike else plan.queries
            found = context.bias.among(queries, plan.keys).to(like.dtype)
            found = found if allowed is None else found.masked_fill(~allowed, -torch.inf)
        if shared > 1 and found.shape[1] > 1:
            found = torch.unflatten(found.expand(*found.shape[:3], self.block, -1), 1, (-1, shared))
            return found.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        found = found.transpose(1, 2)
        return found.repeat(1, 1, 1, shared, 1) if shared > 1 and found.shape[3] > 1 else found

    def wide(self, qkv: tuple[Tensor, Tensor, Tensor], plan: Plan, context: Context) -> Tensor:
        """Return the answers of blocks that look at many keys: [B, H, blocks, C, E]."""
        q, k, v = qkv
        view = context.view
        rows = (plan.wide[:, None] * self.block + torch.arange(self.block, device=q.device)).flatten()
        rows = rows.clamp(max=view.queries - 1)
        places = (rows[None, None, :, None], torch.arange(view.keys, device=q.device)[None, None, None, :])
        allowed = view.among(context.rule.here(view), *places)
        empty = None if allowed is None else ~allowed.any(-1, keepdim=True)
        mask = None if allowed is None or empty is None else allowed | empty
        if context.bias is not None:
            bias = context.bias.among(*places).to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        scale, dropout = self.settings(q)
        out = F.scaled_dot_product_attention(
            q[:, :, rows], k, v, mask, dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out if empty is None else out.masked_fill(empty, 0.0)
        return torch.unflatten(out, 2, (-1, self.block))

    def settings(self, q: Tensor) -> tuple[float, float]:
        """Return the scale of scores, and the dropout that is to be."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale, self.dropout if self.training else 0.0

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        return self.full.weights(q, k, context)


def _beside(x: Tensor, plan: Plan, gather: Gather) -> Tensor:
    """Take single keys or values, for each head that gathers for itself: [B, G, K, E] -> [B, U, g, E]."""
    if not plan.beside.shape[1]:
        return x.new_zeros(len(x), gather.asking, 0, x.shape[-1])
    places = plan.beside.clamp(min=0).expand(len(x), -1)[:, None, :, None]
    found = x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[-1]))
    return found.repeat_interleave(gather.asking // x.shape[1], 1)
