"""The queries and keys of one attention in one batch: what rules are asked about, and what they are lowered to.

Places are laid out as in `polyformer.parts.rules`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.places import Mask, as_scores, at, document_bounds, pieces_of, places_in_documents
from polyformer.parts.rules import Causal, Rule

M = TypeVar("M")


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
        marked: boolean [B, K], tokens that everyone may look at under the rule `Marked`, or None.
    """

    queries: int
    keys: int
    valid: Tensor | None
    key_documents: Tensor | None
    right_padded: bool
    device: torch.device
    marked: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict)
    _biased: tuple[Tensor, Rule, Tensor] | None = None

    @functools.cached_property
    def places(self) -> Tensor:
        """Integers [1 or B, K], the place of each key in its own document, counted from 0 over its real tokens."""
        if self.key_documents is not None:
            return places_in_documents(self.key_documents, self.valid)
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
        return None if self.key_documents is None else pieces_of(self.key_documents, self.valid)

    @functools.cached_property
    def slack(self) -> int:
        """How much further apart two tokens may stand in the row than in their document, by padding between them."""
        return self.loose if self.gaps else 0

    @functools.cached_property
    def loose(self) -> int:
        """The same for tokens that are to come behind this batch's, so that padding on the right counts too."""
        if self.valid is None:
            return 0
        if self.key_documents is not None:
            return self.keys
        behind = self.keys - self.valid.int().argmax(1) - self.valid.sum(1)
        return int(behind.where(self.valid.any(1), 0).max())

    def since(self, first: int) -> View:
        """Return the view of the same queries, with the keys from a place on only; made once."""

        def make() -> View:
            valid, documents = (None if one is None else one[:, first:] for one in (self.valid, self.key_documents))
            if valid is not None and self.device.type == "cpu" and bool(valid.all()):
                valid = None
            return View(self.queries, self.keys - first, valid, documents, self.right_padded, self.device)

        return self.once(("since", first), make)

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The first and the last place of each place's document: two of integers [B, K]."""
        assert self.key_documents is not None
        return document_bounds(self.key_documents)

    def pairs(self, queries: range, keys: range) -> tuple[Tensor, Tensor]:
        """Return the places of a run of queries, [1, 1, s, 1], and of a run of keys, [1, 1, 1, k]."""
        asking, asked = (torch.arange(one.start, one.stop, device=self.device) for one in (queries, keys))
        return asking[None, None, :, None], asked[None, None, None, :]

    def apart(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the place of each key in its document minus that of each query: integers [b, h, ..., s, k].

        Only what stands in one document is compared, so that without gaps their places in the row will do.
        """
        if self.gaps:
            return at(self.places, keys) - at(self.places, queries)
        return as_scores(keys) - as_scores(queries)

    def everywhere(self, rule: Rule) -> Tensor | None:
        """Return where all queries may look, padding aside: boolean [1 or B, 1 or H, S, K]; None means everywhere."""
        return rule.among(self, *self.pairs(range(self.keys - self.queries, self.keys), range(self.keys)))

    def marking(self, marked_BK: Tensor) -> View:
        """Return this view with tokens marked."""
        return View(self.queries, self.keys, self.valid, self.key_documents, self.right_padded, self.device, marked_BK)

    def valid_at(self, keys: Tensor) -> Tensor | None:
        """Return which keys are real: boolean [b, h, ..., 1, k]; None if all are."""
        return None if self.valid is None else at(self.valid, keys)

    def among(self, rule: Rule, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Return where a query may look at a key that is real: boolean [b, h, ..., s, k]; None means everywhere."""
        allowed, real = rule.among(self, queries, keys), self.valid_at(keys)
        return real if allowed is None else allowed if real is None else allowed & real

    def block(self, rule: Rule, queries: range, keys: range) -> Tensor | None:
        """Return the same for two runs of places, [b, 1, s, k]; None where nothing in the block is forbidden."""
        real = self.valid is None or bool(self.valid[:, keys.start : keys.stop].all())
        if rule.opens(self, queries, keys):
            return None if real else self.valid_at(self.pairs(queries, keys)[1])
        asking, asked = self.pairs(queries, keys)
        return rule.among(self, asking, asked) if real else self.among(rule, asking, asked)

    def mask(self, rule: Rule) -> Mask:
        """Lower a rule for this batch."""
        return self.once(rule, lambda: self._lower(rule))

    def once(self, key: Hashable, make: Callable[[], M]) -> M:
        """Return what `make` gave the first time that `key` was asked for: layers share what a rule is lowered to."""
        if key not in self._made:
            self._made[key] = make()
        found: M = self._made[key]
        return found

    def biased(self, rule: Rule, bias: Tensor) -> Tensor:
        """Return a score bias with -inf where the rule forbids (kept as long as layers share the bias)."""
        if self._biased is None or self._biased[0] is not bias or self._biased[1] != rule:
            mask = self.mask(rule)
            allowed = self.everywhere(rule) if mask.causal else mask.allowed
            made = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
            self._biased = (bias, rule, made)
        return self._biased[2]

    def _lower(self, rule: Rule) -> Mask:
        rule = rule.here(self)
        if rule == Causal() and self.queries == self.keys and (self.valid is None or self.right_padded):
            return Mask(causal=self.keys > 1, allowed=None, empty=None)
        allowed = self.everywhere(rule)
        if self.valid is not None:
            if self.valid.shape[-1] != self.keys:
                raise SpecError(f"the attention mask covers {self.valid.shape[-1]} keys, but there are {self.keys}")
            real = self.valid[:, None, None, :]
            allowed = real if allowed is None else allowed & real
        if allowed is None:
            return Mask(causal=False, allowed=None, empty=None)
        empty = ~allowed.any(dim=-1, keepdim=True)
        if not bool(empty.any()):
            return Mask(causal=False, allowed=allowed, empty=None)
        return Mask(causal=False, allowed=allowed | empty, empty=empty)
