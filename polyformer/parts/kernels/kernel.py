"""The seam between an attention and the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.parts.part import Part
from polyformer.parts.rules import Rule, View
from polyformer.spec import Spec


class Kernel(Spec, abstract=True):
    """Computes attention from queries, keys and values under a rule."""

    def unable(self, see: Rule) -> str:
        """Return why this kernel can't follow a rule, or nothing where it can; attention with both can't be made."""
        return ""


@dataclass
class Context:
    """What a kernel must know of one attention beside q, k and v.

    Attributes:
        rule, view: who may look at whom.
        bias: added to the scores, broadcastable to [B, H, S, K]; None for none.
    """

    rule: Rule
    view: View
    bias: Tensor | None = None


class KernelPart(Part):
    """The seam for other attentions: it is handed q, k, v and their context."""

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        """Return the mixed values [B, H, S, E] for q [B, H, S, E], k and v [B, G, K, E] with H a multiple of G.

        A query with nothing to look at gets zeros.
        """
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Return the attention weights [B, H, S, K] themselves, for explanations."""
        raise NotImplementedError


def dense_weights(scores: Tensor, context: Context) -> Tensor:
    """Return the softmax of scores [B, H, S, K] with their bias, in float32 at least, over the keys the rule allows.

    A query with nothing to look at has weights of zero.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if context.bias is not None:
        scores = scores + context.bias
    mask = context.view.mask(context.rule)
    allowed = context.rule.allowed(context.view)[:, None] if mask.causal else mask.allowed  # type: ignore[index]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    found = torch.softmax(scores, -1)
    return found if mask.empty is None else found.masked_fill(mask.empty, 0.0)
