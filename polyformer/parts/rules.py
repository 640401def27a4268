"""Who may look at whom, as data. A kernel lowers a rule to what it runs best; `among` is the plain meaning.

Rules speak of places in the row (index of query and key), never of values; padding is not a rule but a fact
of the batch, and `View` adds it to every rule.

Places are laid out as scores are: of queries [b, h, ..., s, 1], of keys [b, h, ..., 1, k], where b is 1 or the batch,
h is 1 or the heads. [b, s, 1] is short for [b, 1, s, 1], and [s, 1] for [1, 1, s, 1]. What is worked out from them has
the shape of both, [b, h, ..., s, k].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Differs, Refuses, Term
from polyformer.parts.places import End, as_scores, at
from polyformer.spec import Record

if TYPE_CHECKING:
    from polyformer.parts.view import View


class Rule(Record, abstract=True):
    """Which keys a query may look at. Rules combine with `&` (both hold) and `|` (either does)."""

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Return a boolean, True where a query may look at a key, both given by their places; None means everywhere."""
        raise NotImplementedError

    def allowed(self, view: View) -> Tensor | None:
        """Return a boolean [1 or B, S, K] of all pairs; None means everywhere. Raises `SpecError` if heads differ."""
        found = view.everywhere(self)
        if found is not None and found.shape[1] > 1:
            raise SpecError(f"{self} means something else for each head, so it can't be one mask for all of them")
        return None if found is None else found[:, 0]

    def reach(self, view: View, queries: range) -> range:
        """Return a run of keys outside of which none of these queries may look, so that a kernel skips the others."""
        return range(view.keys)

    def opens(self, view: View, queries: range, keys: range) -> bool:
        """Return whether each of these queries may look at each of these keys; False where it would be hard to say."""
        return False

    @property
    def grain(self) -> int:
        """The size of the blocks, counted from the row's left end, in which places are alike; 0 if all are alike."""
        return 1

    @property
    def ends(self) -> frozenset[End]:
        """The ends of the row from which this counts, so that padding there moves it."""
        return frozenset()

    def settled(self) -> Rule:
        """Return the rule as it is when nothing is trained."""
        return self

    def looks_back(self, view: View) -> int | None:
        """Return how many places back queries behind this batch's may look; None where they may look at all."""
        return None

    @property
    def forgetful(self) -> bool:
        """Whether queries look back no further than some number of tokens."""
        return False

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
        ends = [end for end in ("left", "right") if end in self.ends]
        for end in ends:
            moved = f"its rule counts from the {end} end of the row, where padding stands"
            found["padded on the left" if end == "left" else "padded on the right"] = Differs(moved)
        if self.looks_ahead:
            found["cached"] = Refuses("its rule lets queries look at keys behind them; one with Causal() does not")
        elif "right" in ends:
            found["cached"] = Refuses("its rule counts from the right end of the row, which moves as the row grows")
        if not self.keeps_apart:
            found["packed"] = Refuses("its rule lets documents look at each other; one with SameDocument() does not")
        elif ends:
            found["packed"] = Refuses("its rule counts from the ends of the row, not of each document")
        return found

    def __and__(self, other: Rule) -> Rule:
        parts = [rule for side in (self, other) for rule in (side.rules if isinstance(side, All) else (side,))]
        distinct = [r for i, r in enumerate(parts) if not isinstance(r, Everyone) and r not in parts[:i]]
        if not distinct:
            return Everyone()
        return distinct[0] if len(distinct) == 1 else All(tuple(distinct))

    def __or__(self, other: Rule) -> Rule:
        parts = [rule for side in (self, other) for rule in (side.rules if isinstance(side, Either) else (side,))]
        distinct = [r for i, r in enumerate(parts) if not isinstance(r, Nobody) and r not in parts[:i]]
        if not distinct or any(isinstance(r, Everyone) for r in distinct):
            return Everyone() if distinct else Nobody()
        return distinct[0] if len(distinct) == 1 else Either(tuple(distinct))


class Everyone(Rule):
    """Every query looks at every key."""

    @property
    def grain(self) -> int:
        return 0

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return None

    def opens(self, view: View, queries: range, keys: range) -> bool:
        return True


class Nobody(Rule):
    """No query looks at any key; what is left of a rule that says nothing about a batch."""

    @property
    def looks_ahead(self) -> bool:
        return False

    @property
    def keeps_apart(self) -> bool:
        return True

    @property
    def grain(self) -> int:
        return 0

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return (as_scores(keys) < 0) & (as_scores(queries) < 0)

    def reach(self, view: View, queries: range) -> range:
        return range(0)


class Causal(Rule):
    """A query looks at keys at its own place or before it; keys held in a cache come before all queries."""

    @property
    def looks_ahead(self) -> bool:
        return False

    def here(self, view: View) -> Rule:
        return Everyone() if view.queries == 1 else self

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return as_scores(keys) <= as_scores(queries)

    def reach(self, view: View, queries: range) -> range:
        return range(queries.stop)

    def opens(self, view: View, queries: range, keys: range) -> bool:
        return keys.stop <= queries.start + 1


class Window(Rule):
    """A query looks at every `step`-th key to either side, at the `width` nearest of them, its own included.

    `Causal() & Window(w)` is Mistral's sliding window (Jiang et al. 2023, section 2), `Window(w)` Longformer's, and
    with a `step` above 1 its dilated one (Beltagy et al. 2020, section 3.1).
    """

    width: int
    step: int = 1

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")
        self.require(self.step > 0, "step must be at least 1")

    @property
    def span(self) -> int:
        """How far the furthest key may be away."""
        return (self.width - 1) * self.step

    def looks_back(self, view: View) -> int | None:
        return self.span + view.loose

    @property
    def forgetful(self) -> bool:
        return True

    def here(self, view: View) -> Rule:
        return Everyone() if self.step == 1 and view.keys <= self.width else self

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        apart = view.apart(queries, keys)
        near = apart.abs() <= self.span
        return near if self.step == 1 else near & (apart % self.step == 0)

    def reach(self, view: View, queries: range) -> range:
        far = self.span + view.slack
        return range(max(queries.start - far, 0), min(queries.stop + far, view.keys))

    def opens(self, view: View, queries: range, keys: range) -> bool:
        furthest = max(queries.stop - 1 - keys.start, keys.stop - 1 - queries.start)
        return self.step == 1 and furthest <= self.span and not view.gaps


class SameDocument(Rule):
    """A query looks at keys of its own document only: several documents packed into one row don't meet."""

    @property
    def keeps_apart(self) -> bool:
        return True

    def here(self, view: View) -> Rule:
        return Everyone() if view.key_documents is None else self

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        if view.key_documents is None:
            return None
        return at(view.key_documents, queries) == at(view.key_documents, keys)

    def reach(self, view: View, queries: range) -> range:
        if view.key_documents is None or not queries:
            return range(view.keys)
        first, last = (bound[:, queries.start : queries.stop] for bound in view.bounds)
        return range(int(first.min()), int(last.max()) + 1)

    def opens(self, view: View, queries: range, keys: range) -> bool:
        if view.key_documents is None or not queries:
            return view.key_documents is None
        asked = view.key_documents[:, queries.start : queries.start + 1]
        both = (view.key_documents[:, one.start : one.stop] for one in (queries, keys))
        return all(bool((one == asked).all()) for one in both)


class Joined(Rule, abstract=True):
    """Several rules as one."""

    rules: tuple[Rule, ...]

    def check(self) -> None:
        self.require(len(self.rules) > 0, "needs at least one rule")

    @property
    def grain(self) -> int:
        return math.gcd(*(rule.grain for rule in self.rules))

    @property
    def ends(self) -> frozenset[End]:
        return frozenset[End]().union(*(rule.ends for rule in self.rules))


class All(Joined):
    """Every one of several rules holds; written `a & b`."""

    @property
    def looks_ahead(self) -> bool:
        return all(rule.looks_ahead for rule in self.rules)

    @property
    def keeps_apart(self) -> bool:
        return any(rule.keeps_apart for rule in self.rules)

    def settled(self) -> Rule:
        return functools.reduce(Rule.__and__, (rule.settled() for rule in self.rules))

    def looks_back(self, view: View) -> int | None:
        if self.ends:
            return None
        each = [one for rule in self.rules if (one := rule.looks_back(view)) is not None]
        return min(each, default=None)

    @property
    def forgetful(self) -> bool:
        return not self.ends and any(rule.forgetful for rule in self.rules)

    def here(self, view: View) -> Rule:
        return functools.reduce(Rule.__and__, (rule.here(view) for rule in self.rules))

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        found = None
        for rule in self.rules:
            one = rule.among(view, queries, keys)
            if one is not None:
                found = one if found is None else found & one
        return found

    def reach(self, view: View, queries: range) -> range:
        each = [rule.reach(view, queries) for rule in self.rules]
        first = max(one.start for one in each)
        return range(first, max(first, min(one.stop for one in each)))

    def opens(self, view: View, queries: range, keys: range) -> bool:
        return all(rule.opens(view, queries, keys) for rule in self.rules)


class Either(Joined):
    """At least one of several rules holds; written `a | b`."""

    @property
    def looks_ahead(self) -> bool:
        return any(rule.looks_ahead for rule in self.rules)

    @property
    def keeps_apart(self) -> bool:
        return all(rule.keeps_apart for rule in self.rules)

    def settled(self) -> Rule:
        return functools.reduce(Rule.__or__, (rule.settled() for rule in self.rules))

    def here(self, view: View) -> Rule:
        return functools.reduce(Rule.__or__, (rule.here(view) for rule in self.rules))

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        each = [rule.among(view, queries, keys) for rule in self.rules]
        known = [one for one in each if one is not None]
        return functools.reduce(Tensor.logical_or, known) if len(known) == len(each) else None

    def reach(self, view: View, queries: range) -> range:
        each = [run for run in (rule.reach(view, queries) for rule in self.rules) if run]
        return range(min(one.start for one in each), max(one.stop for one in each)) if each else range(0)

    def opens(self, view: View, queries: range, keys: range) -> bool:
        return any(rule.opens(view, queries, keys) for rule in self.rules)
