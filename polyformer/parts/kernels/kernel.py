"""The seam between an attention and the kernel that computes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.bias import Bias
from polyformer.parts.part import Part
from polyformer.parts.rules import All, Rule
from polyformer.parts.view import View
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Ahead, Cache, Pair


class Kernel(Spec, abstract=True):
    """Computes attention from queries, keys and values under a rule."""

    def unable(self, see: Rule) -> str:
        """Return why this kernel can't follow a rule, or nothing where it can; attention with both can't be made."""
        return ""

    def fitted(self, width: int, length: int | None = None) -> Kernel:
        """Return this kernel for heads of a width and sequences of a length, which fill in sizes that it left open.

        Raises:
            SpecError: a size that it has and that doesn't fit, or one that is open still.
        """
        return self

    def unable_across(self) -> str:
        """Return why this kernel can't be that of cross-attention, or nothing where it can."""
        return ""


@dataclass
class Context:
    """What a kernel must know of one attention beside q, k and v.

    Attributes:
        rule, view: who may look at whom.
        bias: what is added to the scores, asked for whole or by places; None for none.
        cache, slot: where what was read before is held, and by what name; None for none.
    """

    rule: Rule
    view: View
    bias: Bias | None = None
    cache: Cache | Ahead | None = None
    slot: str = ""

    def held(self) -> Context:
        """Return the same for the keys that the cache has not forgotten, which are the last."""
        first = 0 if self.cache is None else self.cache.forgotten(self.slot)
        if not first:
            return self
        bias = None if self.bias is None else self.bias.since(first)
        return dataclasses.replace(self, view=self.view.since(first), bias=bias)


class KernelPart(Part):
    """The seam for other attentions: it is handed q, k, v and their context."""

    def recall(self, new: Pair, context: Context) -> Pair:
        """Return what `attend` takes as keys and values, for those of new tokens, each [B, G, S, E].

        That is those of all tokens so far, which the cache holds, or of the last ones where the rule looks no further
        back; a kernel that holds sums in place of them takes the new ones.
        """
        if context.cache is None:
            return new
        return context.cache.extend(context.slot, *new, context.rule.looks_back(context.view))

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        """Return the mixed values [B, H, S, E] for q [B, H, S, E], k and v [B, G, K, E] with H a multiple of G.

        A query with nothing to look at gets zeros.
        """
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Return the attention weights [B, H, S, K] themselves, for explanations."""
        raise NotImplementedError


def rules_of(see: Rule) -> tuple[Rule, ...]:
    """Return the rules that one is made of."""
    return see.rules if isinstance(see, All) else (see,)


def beyond(see: Rule, *known: type[Rule]) -> str:
    """Return what is in a rule that a part knows only by these types can't honour; nothing if it can."""
    odd = next((type(one).__name__ for one in rules_of(see) if not isinstance(one, known)), None)
    able = ", ".join(kind.__name__ for kind in known)
    return "" if odd is None else f"can't honour the rule {odd}; it knows {able}"


def rules_within(context: Context, name: str, *known: type[Rule]) -> tuple[Rule, ...]:
    """Return the rules of an attention, for a part that knows only some and makes no scores.

    Raises:
        SpecError: another rule, or a score bias; `name` is what the part is called.
    """
    odd = beyond(context.rule, *known)
    if odd:
        raise SpecError(f"{name} {odd}")
    if context.bias is not None:
        raise SpecError(f"{name} makes no scores that a position could add a bias to; Rotary turns queries and keys")
    return rules_of(context.rule)


def dense_weights(scores: Tensor, context: Context) -> Tensor:
    """Return the softmax of scores [B, H, S, K] with their bias, in float32 at least, over the keys the rule allows.

    A query with nothing to look at has weights of zero.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if context.bias is not None:
        scores = scores + context.bias.whole()
    mask = context.view.mask(context.rule)
    allowed = context.view.everywhere(context.rule) if mask.causal else mask.allowed
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    found = torch.softmax(scores, -1)
    return found if mask.empty is None else found.masked_fill(mask.empty, 0.0)
