"""An attention-free kernel: each element of a head weighs keys for itself, and queries only gate what it finds.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart, beyond
from polyformer.parts.kernels.sums import Terms, weighted_sums
from polyformer.parts.part import Part
from polyformer.parts.rules import Causal, Everyone, Rule, SameDocument

if TYPE_CHECKING:
    from polyformer.parts.flow import Pair


class AttentionFree(Kernel):
    """sigmoid(qᵢ) ⊙ Σⱼ exp(kⱼ) ⊙ vⱼ / Σⱼ exp(kⱼ), element by element (AFT-simple: Zhai et al. 2021, equation 2, w = 0).

    No query meets a key, so heads play no part, and the cost is linear: for comparison with kernels in which they do. A
    cache holds sums, as that of linear attention. `chunk` rows at a time are worked out against each other where order
    counts; it changes the cost only.
    """

    chunk: int = 8

    def check(self) -> None:
        self.require(self.chunk > 0, f"chunk must be at least 1, not {self.chunk}")

    def unable(self, see: Rule) -> str:
        return beyond(see, Everyone, Causal, SameDocument)

    def module(self) -> Part:
        return AttentionFreePart(self)


class AttentionFreePart(KernelPart):
    """No weights. Each element is a head of width 1 in the weighted sums, whose level is the key itself."""

    def __init__(self, spec: AttentionFree) -> None:
        super().__init__(spec)
        self.terms = Terms(_features, "AttentionFree", spec.chunk)

    def recall(self, new: Pair, context: Context) -> Pair:
        return new

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        with torch.autocast(qkv[0].device.type, enabled=False):
            q, k, v = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in qkv)
            key, value = (one.mT.flatten(1, 2)[..., None] for one in (k, v))
            asking = key.new_zeros(()).expand(*key.shape[:2], q.shape[2], 1)
            sums = weighted_sums((asking, key, F.pad(value, (0, 1), value=1.0)), self.terms, context)
            mixed, total = sums.unbind(-1)
            mixed = torch.unflatten(mixed / total.masked_fill(total == 0, 1.0), 1, (-1, v.shape[-1])).mT
            return (torch.sigmoid(q) * mixed.repeat_interleave(q.shape[1] // k.shape[1], 1)).to(qkv[2].dtype)

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        raise SpecError("AttentionFree weighs keys for each element by itself; a head has no attention weights to show")


def _features(x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """exp(x) of x [B, D, S, 1] as a level and what is left, which is 1 and has the gradient."""
    level = x.detach()
    return (x - level).exp(), level[..., 0]
