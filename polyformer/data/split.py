"""Held-out pairs that give nothing away: a sentence stands in one split only, whichever side it is on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from polyformer.data.pairs import Pair
from polyformer.data.text import fold
from polyformer.errors import DataError

Text = tuple[str, str]  # language, folded text
T = TypeVar("T")


class Shares(NamedTuple):
    """Which share of the pairs is held out; `seed` chooses others."""

    validation: float
    test: float
    seed: int = 0


def split(pairs: Sequence[Pair], shares: Shares) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Return (train, validation, test).

    Pairs that share a text of one language, up to case, digits, punctuation and placeholders, belong to one group,
    and so do pairs that are linked through others. A group goes where the SHA-256 hash of its smallest text says, so
    that the split neither depends on the order of the pairs nor changes much as a corpus grows. A group so large
    that it would fill a tenth of a held-out part is trained on.

    Raises:
        DataError: there are too few groups to hold some out.
    """
    groups = _groups(pairs, shares.seed)
    few = (
        f"{len(pairs):,} pairs in {len(groups):,} groups of related sentences are too few to hold some out for "
        "validation and test; give more, or hold out none (validation = 0, test = 0)"
    )
    parts = hold_out(groups, shares, few)
    for part in parts:
        part.sort(key=lambda pair: (hashed(shares.seed, pair), pair))
    return parts


def hold_out(groups: Iterable[tuple[float, list[T]]], shares: Shares, few: str) -> tuple[list[T], list[T], list[T]]:
    """Share out groups by their hashes, smallest first: (train, validation, test).

    Args:
        few: what to say where there are too few groups to hold some out.
    Raises:
        DataError: there are.
    """
    groups = sorted(groups, key=lambda one: one[0])
    total = sum(len(group) for _, group in groups)
    wanted = min((share for share in (shares.validation, shares.test) if share > 0), default=0.0) * total
    small = [number for number, group in groups if len(group) <= max(wanted / 10, 8)]
    tests = _count(small, 0.0, shares.test)
    validations = _count(small[tests:], shares.test, shares.test + shares.validation)
    if tests + validations >= len(groups):
        raise DataError(few)
    place = dict.fromkeys(small[:tests], 2) | dict.fromkeys(small[tests : tests + validations], 1)
    parts: tuple[list[T], list[T], list[T]] = ([], [], [])
    for number, group in groups:
        parts[place.get(number, 0)].extend(group)
    return parts


def _count(hashes: Sequence[float], start: float, stop: float) -> int:
    """Count the sorted hashes below `stop`; at least one where the share is not nothing."""
    return max(sum(value < stop for value in hashes), 1) if stop > start else 0


def _groups(pairs: Sequence[Pair], seed: int) -> list[tuple[float, list[Pair]]]:
    """Return the groups of pairs that share a text, or are linked through others, with their hashes."""
    return linked(pairs, _sides, seed)


def _sides(pair: Pair) -> list[Text]:
    return [(pair.source_language, fold(pair.source)), (pair.target_language, fold(pair.target))]


def linked(
    items: Sequence[T], keys: Callable[[T], Sequence[tuple[str, ...]]], seed: int
) -> list[tuple[float, list[T]]]:
    """Return the groups of items that share a key, or are linked through others, by union-find; with their hashes.

    Args:
        keys: of an item, at least one.
        seed: of the hashes, which are those of each group's smallest key.
    """
    parent: dict[tuple[str, ...], tuple[str, ...]] = {}

    def root(key: tuple[str, ...]) -> tuple[str, ...]:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent[above]
            key = above
        return key

    firsts = []
    for item in items:
        first, *others = keys(item)
        for other in others:
            smaller, larger = sorted((root(first), root(other)))
            parent[larger] = smaller  # so that a root is its group's smallest key
        firsts.append(first)
    members: dict[tuple[str, ...], list[T]] = {}
    for first, item in zip(firsts, items, strict=True):
        members.setdefault(root(first), []).append(item)
    return [(hashed(seed, smallest), group) for smallest, group in members.items()]


def hashed(seed: int, texts: tuple[str, ...]) -> float:
    """Return a number in [0, 1) that is the same on every machine."""
    digest = hashlib.sha256("\0".join((str(seed), *texts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
