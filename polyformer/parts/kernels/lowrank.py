"""Attention to a fixed number of mixtures of keys, whatever the length.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart, beyond, rules_within
from polyformer.parts.part import Part, draw_normal
from polyformer.parts.rules import Everyone, Rule, SameDocument


class Linformer(Kernel):
    """softmax(scale · q (P k)ᵀ) (P' v): keys and values mixed by P and P' (Wang et al. 2020, equation 7).

    P and P' [rank, length] are trained, and shared by all heads; "shared" projections are one matrix (key-value
    sharing, section 4). One for all layers (layer-wise sharing) is a `Tie` of each kernel's `keys` to the first one's.

    A sequence of up to `length` real tokens uses the columns of its places, wherever its padding stands. What mixes all
    keys can't tell them apart, so that `Causal`, `Window`, packed documents and score biases are errors. `scale` None
    is 1/√E; `dropout` drops weights in training. `length` may be left open where a model will tell it (`fitted`);
    building needs it.
    """

    length: int | None = None
    rank: int = 64
    projections: Literal["separate", "shared"] = "separate"
    scale: float | None = None
    dropout: float = 0.0

    def check(self) -> None:
        positive = self.rank > 0 and (self.length is None or self.length > 0)
        self.require(positive, "length and rank must be at least 1")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def unable(self, see: Rule) -> str:
        return beyond(see, Everyone, SameDocument)

    def breaks(self) -> Mapping[Clause, Term]:
        return {"packed": Refuses("its projections mix all keys, so nothing can keep documents apart")}

    def fitted(self, width: int, length: int | None = None) -> Linformer:
        if self.length is not None:
            return self
        self.require(length is not None, "needs the longest sequence; set its length")
        return self.replace(length=length)

    def module(self) -> Part:
        self.require(self.length is not None, "needs the longest sequence to be built; set its length")
        return LinformerPart(self)


class LinformerPart(KernelPart):
    """Holds P, and P' where it is another matrix; they begin as random projections, which keep lengths (theorem 2)."""

    def __init__(self, spec: Linformer) -> None:
        super().__init__(spec)
        assert spec.length is not None
        self.keys = nn.Parameter(torch.empty(spec.rank, spec.length))
        self.values = nn.Parameter(torch.empty(spec.rank, spec.length)) if spec.projections == "separate" else None
        self.scale, self.dropout = spec.scale, spec.dropout
        for one in self.parameters():
            draw_normal(one, spec.rank**-0.5)

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, v = qkv
        keys, values = (mixing.to(q.dtype) @ x for mixing, x in zip(self._mixing(context), (k, v), strict=True))
        dropout, grouped = self.dropout if self.training else 0.0, q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, None, dropout, scale=self.scale, enable_gqa=grouped)

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Return how much of each value a query gets; some of it may be negative."""
        for_keys, for_values = self._mixing(context)
        keys = (for_keys.to(q.dtype) @ k).repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return (q @ keys.mT * scale).softmax(-1) @ for_values.to(q.dtype)

    def _mixing(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return P and P' for the places of this batch's keys, each [R, K] or [B, 1, R, K] with zeros at padding."""
        rules_within(context, "Linformer", Everyone, SameDocument)
        view = context.view
        length = self.keys.shape[1]
        found = view.keys if view.valid is None else int(view.valid.sum(1).max())
        if found > length:
            raise SpecError(f"this Linformer's projections are for up to {length} keys, not {found}")
        both = (self.keys, self.keys if self.values is None else self.values)
        if view.valid is None:
            return both[0][:, :found], both[1][:, :found]
        columns, padding = (view.valid.long().cumsum(1) - 1).clamp(min=0), ~view.valid[..., None]
        keys, values = (one.T[columns].masked_fill(padding, 0.0).mT[:, None] for one in both)
        return keys, values
