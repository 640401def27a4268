"""Who may look at whom, as data. A kernel lowers a rule to what it runs best; `allowed` is the plain meaning.

Rules speak of places in the sequence (index of query and key), never of values; padding is not a rule but a fact
of the batch, and `View` adds it to every rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.spec import Record


class Rule(Record, abstract=True):
    """Which keys a query may look at. Rules combine with `&`."""

    def allowed(self, view: View) -> Tensor | None:
        """Return a boolean [1 or B, S, K], True where query s may look at key k; None means everywhere."""
        raise NotImplementedError

    def __and__(self, other: Rule) -> Rule:
        parts = [rule for side in (self, other) for rule in (side.rules if isinstance(side, All) else (side,))]
        distinct = [r for i, r in enumerate(parts) if not isinstance(r, Everyone) and r not in parts[:i]]
        if not distinct:
            return Everyone()
        return distinct[0] if len(distinct) == 1 else All(tuple(distinct))


class Everyone(Rule):
    """Every query looks at every key."""

    def allowed(self, view: View) -> Tensor | None:
        return None


class Causal(Rule):
    """A query looks at keys at its own place or before it; keys held in a cache come before all queries."""

    def allowed(self, view: View) -> Tensor | None:
        if view.queries == 1:
            return None
        places = torch.arange(view.keys, device=view.device)
        return (places[None, :] <= places[view.keys - view.queries :, None])[None]


class SameDocument(Rule):
    """A query looks at keys of its own document only: several documents packed into one row don't meet."""

    def allowed(self, view: View) -> Tensor | None:
        if view.key_documents is None:
            return None
        own = view.key_documents[:, view.keys - view.queries :]
        return own[:, :, None] == view.key_documents[:, None, :]


class All(Rule):
    """Every one of several rules holds; written `a & b`."""

    rules: tuple[Rule, ...]

    def check(self) -> None:
        self.require(len(self.rules) > 0, "needs at least one rule")

    def allowed(self, view: View) -> Tensor | None:
        found = None
        for rule in self.rules:
            one = rule.allowed(view)
            if one is not None:
                found = one if found is None else found & one
        return found


@dataclass
class Mask:
    """A rule lowered for one batch.

    Attributes:
        causal: the rule is the plain causal triangle, S == K, and nothing else.
        allowed: boolean [1 or B, 1, S, K], or None where everything is allowed (or `causal` says it all). Rows
            with nothing to look at are opened to every key here, so that no softmax divides by zero.
        empty: boolean [B, 1, S, 1], True for those rows, whose result is zeros; None if there are none.
    """

    causal: bool
    allowed: Tensor | None
    empty: Tensor | None


@dataclass
class View:
    """The queries and keys of one attention in one batch, seen by rules; masks are made once per rule and kept.

    Queries are the last S of the K keys' places for self-attention; for cross-attention no rule of order applies.

    Attributes:
        queries, keys: S and K.
        valid: boolean [B, K], False for padding; None if every key is real.
        key_documents: integers [B, K] telling packed documents apart, or None.
        right_padded: all padding stands behind the real tokens, so that under a causal rule no real query
            could see it anyway.
        device: where masks are made.
    """

    queries: int
    keys: int
    valid: Tensor | None
    key_documents: Tensor | None
    right_padded: bool
    device: torch.device
    _masks: dict[Rule, Mask] = field(default_factory=dict)

    def mask(self, rule: Rule) -> Mask:
        """Lower a rule for this batch."""
        found = self._masks.get(rule)
        if found is None:
            found = self._masks[rule] = self._lower(rule)
        return found

    def _lower(self, rule: Rule) -> Mask:
        if rule == Causal() and self.queries == self.keys and (self.valid is None or self.right_padded):
            return Mask(causal=self.keys > 1, allowed=None, empty=None)
        allowed = rule.allowed(self)
        if self.valid is not None:
            if self.valid.shape[-1] != self.keys:
                raise SpecError(f"the attention mask covers {self.valid.shape[-1]} keys, but there are {self.keys}")
            real = self.valid[:, None, :]
            allowed = real if allowed is None else allowed & real
        if allowed is None:
            return Mask(causal=False, allowed=None, empty=None)
        empty = ~allowed.any(dim=-1, keepdim=True)
        if not bool(empty.any()):
            return Mask(causal=False, allowed=allowed[:, None], empty=None)
        return Mask(causal=False, allowed=(allowed | empty)[:, None], empty=empty[:, None])
