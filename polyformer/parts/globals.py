"""Global tokens: they look at all keys through projections of their own, and all queries look at them.

Shape letters: B batch, S rows, D width, H heads, E head width, g global tokens of the sequence that has most of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.attention import Attention, AttentionPart
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.kernels.softmax import exact_on_cpu
from polyformer.parts.part import Part
from polyformer.parts.rules import Everyone, SameDocument
from polyformer.parts.view import View
from polyformer.spec import Record, Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow

INPUT = "global_attention_mask"


class Globals(Record, abstract=True):
    """Which tokens are global where the batch doesn't say."""

    def of(self, flow: Flow) -> Tensor | None:
        """Return them, boolean [1 or B, S], perhaps with padding among them; None for none at all."""
        raise NotImplementedError


class NoToken(Globals):
    """None."""

    def of(self, flow: Flow) -> Tensor | None:
        return None


class FirstToken(Globals):
    """The first one of each sequence, which stands for all of it."""

    def of(self, flow: Flow) -> Tensor | None:
        return flow.view.places == 0


class Before(Globals):
    """Those before the first `token`, as a question stands before the text that it is asked of."""

    token: int

    def of(self, flow: Flow) -> Tensor | None:
        ends = flow.inputs["ids"] == self.token
        if flow.view.valid is not None:
            ends = ends & flow.view.valid
        if flow.view.key_documents is not None or not bool(ends.any(1).all()):
            raise SpecError(
                f"which tokens are global can't be told by the first {self.token} of each row, which one row has not "
                f"or several documents share; give {INPUT}"
            )
        return ends.long().cumsum(1) == 0


class GlobalAttention(Spec):
    """Longformer's attention (Beltagy et al. 2020, section 3.1).

    All rows go through `local`, whose rule lets them look at `Marked` tokens beside their window. The answers for
    global tokens are then replaced by those of `q`, `k` and `v`, with which they look at all keys of their document;
    `dropout` drops weights of these. The batch says which tokens are global by `global_attention_mask` [B, S], non-zero
    where they are, and `absent` where a batch doesn't. Padding never is.
    """

    local: Attention
    q: Spec
    k: Spec
    v: Spec
    absent: Globals = NoToken()
    dropout: float = 0.0

    def check(self) -> None:
        heads = self.local.heads
        self.require(heads.count == heads.groups, "global tokens ask keys of all heads, so local can't share any")
        self.require(self.local.see.looks_ahead, "global tokens look ahead, so the rule of local can't be causal")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def breaks(self) -> Mapping[Clause, Term]:
        return {"cached": Refuses("its global tokens look at keys behind them")}

    def module(self) -> Part:
        return GlobalAttentionPart(self)


class GlobalAttentionPart(Part):
    """x [B, S, D] -> [B, S, D]."""

    reads = frozenset((INPUT,))

    local: AttentionPart
    q: Part
    k: Part
    v: Part

    def __init__(self, spec: GlobalAttention) -> None:
        super().__init__(spec)
        self.absent, self.dropout = spec.absent, spec.dropout
        self.see = SameDocument() if spec.local.see.keeps_apart else Everyone()

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        view = flow.once(("global tokens", self.absent), lambda: self.marking(x, flow))
        if view is None or view.marked is None:
            return self.local(x, flow)
        plain, flow.view = flow.view, view
        try:
            out = self.local(x, flow)
        finally:
            flow.view = plain
        first, rows = view.marked.int().topk(int(view.marked.sum(1).max()), 1)
        there = first.bool()
        batch = there.nonzero()[:, 0]
        q, k, v = self.asked(x, rows, flow)
        allowed = view.among(
            self.see.here(view), rows[:, None, :, None], torch.arange(view.keys, device=x.device)[None]
        )
        if allowed is not None:
            allowed = allowed | ~there[:, None, :, None]
        with exact_on_cpu(q) as widen:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(widen(q), widen(k), widen(v), allowed, dropout).to(q.dtype)
        if flow.trace is not None and "attention" in flow.trace.wants:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
            found = torch.softmax(scores.float(), -1).detach().transpose(1, 2)[there]
            flow.trace.attention[flow.path + self.local.slot].transpose(1, 2)[batch, rows[there]] = found
        answers = self.local.o(mixed.transpose(1, 2).flatten(2), flow)
        return out.index_put((batch, rows[there]), answers[there].to(out.dtype))

    def asked(self, x: Tensor, rows: Tensor, flow: Flow) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the global tokens [B, H, g, E], keys and values of all [B, H, S, E]."""
        heads, split = self.local.heads.count, self.local.split
        asking = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        return split(self.q(asking, flow), heads), split(self.k(x, flow), heads), split(self.v(x, flow), heads)

    def marking(self, x: Tensor, flow: Flow) -> View | None:
        """Return the view with global tokens marked, or None where there are none."""
        view, given = flow.view, flow.inputs.get(INPUT)
        if given is not None and given.shape != x.shape[:2]:
            raise SpecError(f"{INPUT} has shape {list(given.shape)}, but the rows {list(x.shape[:2])}")
        marked = self.absent.of(flow) if given is None else given != 0
        if marked is None:
            return None
        marked = marked.expand(len(x), -1) if view.valid is None else marked & view.valid
        return view.marking(marked) if bool(marked.any()) else None
