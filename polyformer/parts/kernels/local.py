"""Softmax attention within chunks of the text and to their neighbours.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width, N chunks, C rows of a chunk, W
chunks that each looks at. A small b or h is 1 where all are alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.contract import Clause, Differs, Refuses, Term
from polyformer.parts.kernels.chunks import Chunks, Layout, allowed, rows_at
from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart
from polyformer.parts.kernels.softmax import exact_on_cpu
from polyformer.parts.part import Part


class Local(Kernel):
    """softmax(scale · q kᵀ + bias) v over the keys of a query's own chunk and of its neighbours that the rule allows.

    Layers of it stand between those of hashing in Reformer's models (Kitaev et al. 2020). Time and memory grow with
    n · size. `scale` None is 1/√E; `dropout` drops weights in training.
    """

    chunks: Chunks
    scale: float | None = None
    dropout: float = 0.0

    def check(self) -> None:
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def unable_across(self) -> str:
        return "its chunks are those of one text, whose own rows look at each other"

    def breaks(self) -> Mapping[Clause, Term]:
        if self.chunks.ends == "apart":
            return {}
        length = Differs("its chunks stand in a circle, whose length is that of the longest row with its padding")
        return {
            "padded on the right": length,
            "padded on the left": length,
            "cached": Refuses("its chunks stand in a circle, which is not closed before the text ends"),
            "packed": Refuses("its chunks stand in one circle, on which documents would come between each other"),
        }

    def module(self) -> Part:
        return LocalPart(self)


class LocalPart(KernelPart):
    """Each chunk is a sequence of a larger batch for PyTorch's attention."""

    def __init__(self, spec: Local) -> None:
        super().__init__(spec)
        self.chunks, self.scale, self.dropout = spec.chunks, spec.scale, spec.dropout

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, v = qkv
        view = context.view
        if not view.queries or not view.keys:
            return v.new_zeros(*q.shape[:3], v.shape[-1])
        layout, past = Layout.of(view, self.chunks.within(view.keys)), view.keys - view.queries
        with exact_on_cpu(q) as widen:
            mask, empty = self._mask(layout, context)
            queries = rows_at(widen(q), layout.asking - past)
            keys, values = (layout.beside(rows_at(widen(one), layout.rows)) for one in (k, v))
            out = F.scaled_dot_product_attention(
                _as_batch(queries),
                _as_batch(keys),
                _as_batch(values),
                attn_mask=_as_batch(mask if mask.dtype == torch.bool else mask.to(queries.dtype), len(q)),
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        out = out.to(q.dtype).masked_fill(_as_batch(empty, len(q)), 0.0)
        out = torch.unflatten(out, 0, (len(q), -1)).transpose(1, 2).flatten(2, 3)
        return rows_at(out, layout.slots[:, :, 0, past:] - layout.first * layout.chunks.size)

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        view = context.view
        layout = Layout.of(view, self.chunks.within(view.keys))
        queries = rows_at(q, layout.asking - (view.keys - view.queries))
        keys = layout.beside(rows_at(k.repeat_interleave(q.shape[1] // k.shape[1], 1), layout.rows))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (queries @ keys.mT * scale).to(torch.promote_types(q.dtype, torch.float32))
        mask, empty = self._mask(layout, context)
        masked = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return layout.spread(masked.softmax(-1).masked_fill(empty, 0.0), view)

    def _mask(self, layout: Layout, context: Context) -> tuple[Tensor, Tensor]:
        """Return which keys are looked at [b, h, 1, N, C, W·C], or with a bias what is added, and which rows see none.

        Rows with nothing to look at are opened to every key, so that no softmax divides by zero.
        """
        view = context.view
        asking, asked = layout.asking, layout.asked()
        seen = allowed(context.rule, view, asking, asked)
        empty = ~seen.any(-1, keepdim=True)
        seen = seen | empty
        if context.bias is None:
            return seen, empty
        added = context.bias.among(
            asking[..., None].clamp(min=view.keys - view.queries), asked[..., None, :].clamp(min=0)
        )
        return added.masked_fill(~seen, float("-inf")), empty


def _as_batch(x: Tensor, batch: int = -1) -> Tensor:
    """[b, h, 1, N, ...] -> [B·N, h, ...]."""
    return x[:, :, 0].transpose(1, 2).expand(batch, *[-1] * (x.ndim - 2)).flatten(0, 1)
