"""Exact softmax attention within a sliding window, whose cost grows with length times width.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width, N blocks of c queries, W keys of a
block's strip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.kernels.kernel import Context, Kernel, rules_of
from polyformer.parts.kernels.softmax import SoftmaxPart, exact_on_cpu
from polyformer.parts.part import Part
from polyformer.parts.rules import Causal, Rule, SameDocument, Window
from polyformer.parts.view import View


class Sliding(Kernel):
    """softmax(scale · q kᵀ + bias) v under a rule with a `Window` (Longformer: Beltagy et al. 2020, section 3.1).

    Each `block` of queries meets the strip of keys that its windows reach. A window with a `step` is cut into as many
    sequences of their own, so that no key between is read. Any other rule and score bias can be had with it; what is
    not much longer than a strip is left to PyTorch's attention over all keys. `block` changes the cost only.

    `scale` None is 1/√E; `dropout` drops attention weights in training.
    """

    block: int = 128
    scale: float | None = None
    dropout: float = 0.0

    def check(self) -> None:
        self.require(self.block > 0, f"block must be at least 1, not {self.block}")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def unable(self, see: Rule) -> str:
        return "" if any(isinstance(one, Window) for one in rules_of(see)) else "no Window in it says how far to look"

    def module(self) -> Part:
        return SlidingPart(self)


@dataclass(frozen=True)
class Strips:
    """How one sequence is cut: every `step`-th place of the row, from `first` on.

    Attributes:
        first, step: its places.
        keys, past: how many there are, and how many of them come before the first query.
        block: c.
        back, ahead: how many keys a window reaches before and behind a query.
    """

    first: int
    step: int
    keys: int
    past: int
    block: int
    back: int
    ahead: int

    @property
    def blocks(self) -> int:
        """N."""
        return -(-(self.keys - self.past) // self.block)

    @property
    def width(self) -> int:
        """W."""
        return self.back + self.block + self.ahead

    def own(self, x: Tensor) -> Tensor:
        """Return the rows of keys [..., K, E] that are its own."""
        return x[..., self.first :: self.step, :]

    def asking(self, x: Tensor) -> Tensor:
        """Cut its queries [H, s, E], filled up with zeros: [N, H, c, E]."""
        lack = -x.shape[1] % self.block
        x = F.pad(x, (0, 0, 0, lack)) if lack else x
        return torch.unflatten(x, 1, (-1, self.block)).transpose(0, 1)

    def asked(self, x: Tensor) -> Tensor:
        """Lay the strips of its keys [G, k, E] behind each other, zeros where there are none: [N, G, W, E]."""
        start = self.past - self.back
        end = self.past + self.blocks * self.block + self.ahead
        x = F.pad(x[:, max(start, 0) : end], (0, 0, max(-start, 0), max(end - self.keys, 0)))
        return x.unfold(1, self.width, self.block).permute(1, 0, 3, 2)

    def kinds(self) -> tuple[list[int], list[int]]:
        """Return blocks of which each is like some others, where only distances count, and which of them each is like.

        Those whose strip is whole are alike.
        """
        kinds: list[int] = []
        like, whole = [], None
        for i in range(self.blocks):
            start = self.past + i * self.block
            if start >= self.back and start + self.block + self.ahead <= self.keys:
                if whole is not None:
                    like.append(whole)
                    continue
                whole = len(kinds)
            like.append(len(kinds))
            kinds.append(i)
        return kinds, like

    def places(self, view: View, blocks: list[int] | range) -> tuple[Tensor, Tensor, Tensor]:
        """Return places of queries [1, 1, N, c, 1] and of keys [1, 1, N, 1, W], and where these are keys at all."""
        firsts = torch.tensor(list(blocks), device=view.device)[:, None] * self.block + self.past
        queries = (firsts + torch.arange(self.block, device=view.device)).clamp(max=self.keys - 1)
        keys = firsts + torch.arange(-self.back, self.block + self.ahead, device=view.device)
        inside = (keys >= 0) & (keys < self.keys)
        asking, asked = (one * self.step + self.first for one in (queries, keys.clamp(0, self.keys - 1)))
        return asking[None, None, ..., None], asked[None, None, :, None], inside[None, None, :, None]


@dataclass
class StripMask:
    """Who may look at whom in strips.

    Attributes:
        added: 0 or, where a query may not look, -inf: [b, 1, N, c, W]. Rows with nothing to look at are opened.
        empty: boolean [b, 1, N, c, 1], True for those rows; None if there are none.
    """

    added: Tensor
    empty: Tensor | None

    @classmethod
    def of(cls, rule: Rule, view: View, strips: Strips, dtype: torch.dtype) -> StripMask:
        """Lower a rule."""
        alike = view.valid is None and view.key_documents is None
        alike = alike and all(isinstance(one, Causal | Window | SameDocument) for one in rules_of(rule))
        kinds, like = strips.kinds() if alike else (list(range(strips.blocks)), None)
        queries, keys, inside = strips.places(view, kinds)
        among = view.among(rule, queries, keys)
        allowed = inside if among is None else among & inside
        empty = ~allowed.any(-1, keepdim=True)
        added = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~(allowed | empty), -torch.inf)
        if like is not None:  # where nothing is empty, since each query sees its own key
            return cls(added[:, :, torch.tensor(like, device=added.device)], None)
        return cls(added, empty if bool(empty.any()) else None)


class SlidingPart(SoftmaxPart):
    """No weights."""

    def __init__(self, spec: Sliding) -> None:
        super().__init__(spec, spec.scale, spec.dropout)
        self.block = spec.block

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, v = qkv
        found = list(self._cut(context, q.shape[2]))
        if not found:
            return super().attend(qkv, context)
        with exact_on_cpu(q) as widen:
            q, k, v = widen(q), widen(k), widen(v)
            if found[0].step == 1:
                out = self._slide((q, k, v), context, found[0])
            else:
                out, past = torch.zeros_like(q), k.shape[2] - q.shape[2]
                for strips in found:
                    rows = slice(strips.first + strips.past * strips.step - past, None, strips.step)
                    out[:, :, rows] = self._slide((q[:, :, rows], strips.own(k), strips.own(v)), context, strips)
        return out.to(qkv[0].dtype)

    def _cut(self, context: Context, length: int) -> Iterator[Strips]:
        """Yield the sequences that a window's steps make of the row; none where all keys at once are cheaper."""
        view, rules = context.view, rules_of(context.rule.here(context.view))
        window = min((one for one in rules if isinstance(one, Window)), key=lambda one: one.span, default=None)
        if window is None:
            return
        step = 1 if view.gaps else window.step  # which key is how many places away differs from row to row
        back = (window.span + view.slack) // step
        for first in range(min(step, view.keys)):
            keys = -(-(view.keys - first) // step)
            past = max(-(-(view.keys - length - first) // step), 0)
            ahead = 0 if Causal() in rules else back
            if keys > past:
                strips = Strips(first, step, keys, past, min(self.block, keys - past), back, ahead)
                if view.keys <= 2 * strips.width:
                    return
                yield strips

    def _slide(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context, strips: Strips) -> Tensor:
        """Return the mixed values of one sequence's queries [B, H, s, E]."""
        q, k, v = qkv
        view, key = context.view, ("strips", context.rule, strips, q.dtype)
        mask = view.once(key, lambda: StripMask.of(context.rule, view, strips, q.dtype))
        added = mask.added
        if context.bias is not None:
            added = context.bias.among(*strips.places(view, range(strips.blocks))[:2]).to(q.dtype) + added
        out = []
        for i in range(len(q)):
            found = F.scaled_dot_product_attention(
                strips.asking(q[i]),
                strips.asked(k[i]),
                strips.asked(v[i]),
                attn_mask=_row(added, i),
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            found = found if mask.empty is None else found.masked_fill(_row(mask.empty, i), 0.0)
            out.append(found.transpose(0, 1).flatten(1, 2)[:, : q.shape[2]])
        return torch.stack(out)


def _row(x: Tensor, i: int) -> Tensor:
    """One batch row of [b, h, N, c, ...], as [N, h, c, ...]."""
    return x[i if len(x) > 1 else 0].transpose(0, 1)
