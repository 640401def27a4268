"""Who may look at whom, as data. A kernel lowers a rule to what it runs best; `allowed` is the plain meaning.

Rules speak of places in the sequence (index of query and key), never of values; padding is not a rule but a fact
of the batch, and `View` adds it to every rule.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.spec import Record


class Rule(Record, abstract=True):
    """Which keys a query may look at. Rules combine with `&`."""

    def allowed(self, view: View) -> Tensor | None:
        """Return a boolean [1 or B, S, K], True where query s may look at key k; None means everywhere."""
        raise NotImplementedError

    def here(self, view: View) -> Rule:
        """Return the simplest rule that means the same in this batch."""
        return self

    @property
    def looks_ahead(self) -> bool:
        """Whether a query may look at keys behind it, which are not there yet where a text is read piece by piece."""
        return True

    @property
    def keeps_apart(self) -> bool:
        """Whether no query looks at another document's keys."""
        return False

    def breaks(self) -> Mapping[Clause, Term]:
        """Return what a part whose rows meet under this rule can't hold of the invariance contract."""
        found: dict[Clause, Term] = {}
        if self.looks_ahead:
            found["cached"] = Refuses("its rule lets queries look at keys behind them; one with Causal() does not")
        if not self.keeps_apart:
            found["packed"] = Refuses("its rule lets documents look at each other; one with SameDocument() does not")
        return found

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

    @property
    def looks_ahead(self) -> bool:
        return False

    def allowed(self, view: View) -> Tensor | None:
        if view.queries == 1:
            return None
        places = torch.arange(view.keys, device=view.device)
        return (places[None, :] <= places[view.keys - view.queries :, None])[None]


class Window(Rule):
    """A query looks at keys less than `width` places away, to either side; `Causal() & Window(w)` is Mistral's
    sliding window (Jiang et al. 2023, section 2), `Window(w)` Longformer's (Beltagy et al. 2020)."""

    width: int

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")

    def here(self, view: View) -> Rule:
        return Everyone() if view.keys <= self.width else self

    def allowed(self, view: View) -> Tensor | None:
        return view.apart().abs() < self.width


class SameDocument(Rule):
    """A query looks at keys of its own document only: several documents packed into one row don't meet."""

    @property
    def keeps_apart(self) -> bool:
        return True

    def here(self, view: View) -> Rule:
        return Everyone() if view.key_documents is None else self

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

    @property
    def looks_ahead(self) -> bool:
        return all(rule.looks_ahead for rule in self.rules)

    @property
    def keeps_apart(self) -> bool:
        return any(rule.keeps_apart for rule in self.rules)

    def here(self, view: View) -> Rule:
        return functools.reduce(Rule.__and__, (rule.here(view) for rule in self.rules))

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
    _biased: tuple[Tensor, Rule, Tensor] | None = None

    @functools.cached_property
    def places(self) -> Tensor:
        """Integers [1 or B, K], the place of each key in its own document, counted from 0 over its real tokens."""
        if self.key_documents is not None:
            return _places_in_documents(self.key_documents, self.valid)
        if self.valid is None or self.right_padded:
            return torch.arange(self.keys, device=self.device)[None]
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    @functools.cached_property
    def gaps(self) -> bool:
        """Whether padding may stand between real tokens, as where a padded prompt is continued."""
        if self.valid is None or self.right_padded:
            return False
        return bool((self.valid[:, :-1] & ~self.valid[:, 1:]).any())

    @functools.cached_property
    def pieces(self) -> Tensor | None:
        """Integers [B, K] numbering packed documents from left to right, each document's padding with it; None if
        none are packed.

        Raises:
            SpecError: a document that doesn't stand in one piece, which nothing but a mask of all pairs could tell.
        """
        documents = self.key_documents
        if documents is None:
            return None
        if self.valid is not None:  # padding may have any number
            places = torch.arange(self.keys, device=self.device)
            first = self.valid.int().argmax(1, keepdim=True)
            documents = documents.gather(1, torch.where(self.valid, places, first).cummax(1).values)
        numbers = _changes(documents).cumsum(1)
        if bool((numbers[:, -1:] != _changes(documents.sort(1).values).sum(1, keepdim=True)).any()):
            raise SpecError("each packed document must stand in one piece here; rows of another one part one of them")
        return numbers

    def apart(self) -> Tensor:
        """Return the place of each key minus that of each query: integers [1 or B, S, K].

        Only what stands in one document is compared, so that without gaps their places in the row will do.
        """
        places = self.places if self.gaps else torch.arange(self.keys, device=self.device)[None]
        return places[:, None, :] - places[:, self.keys - self.queries :, None]

    def mask(self, rule: Rule) -> Mask:
        """Lower a rule for this batch."""
        found = self._masks.get(rule)
        if found is None:
            found = self._masks[rule] = self._lower(rule)
        return found

    def biased(self, rule: Rule, bias: Tensor) -> Tensor:
        """Return a score bias with -inf where the rule forbids (kept as long as layers share the bias)."""
        if self._biased is None or self._biased[0] is not bias or self._biased[1] != rule:
            mask = self.mask(rule)
            allowed = rule.allowed(self)[:, None] if mask.causal else mask.allowed  # type: ignore[index]
            made = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
            self._biased = (bias, rule, made)
        return self._biased[2]

    def _lower(self, rule: Rule) -> Mask:
        rule = rule.here(self)
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


def _changes(documents: Tensor) -> Tensor:
    """Tell where an id differs from the one before: [B, K] -> boolean [B, K]."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))


def _places_in_documents(documents: Tensor, valid: Tensor | None) -> Tensor:
    """Count from 0 within each run of equal ids, whatever ids padding has: [B, K] -> [B, K]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if valid is not None:
        starts[:, 1:] |= valid[:, 1:] != valid[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values
