"""From corpora to clean pairs for training, validation and test, with an account of everything left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from polyformer.data.corpus import Corpus
from polyformer.data.pairs import Pair, split_direction
from polyformer.data.split import Shares, split
from polyformer.data.text import count_words, letter_share, normalise, script_share, sentences
from polyformer.errors import DataError
from polyformer.spec import Record

READ, SPLIT = "read", "gained by splitting"
EMPTY, SAME, FEW_LETTERS, DUPLICATE = "one side empty", "source equals target", "few letters", "duplicate"
SHORT, LONG, UNEVEN, SCRIPT = "too short", "too long", "lengths too different", "not in its language's script"
FAULTS = (EMPTY, SAME, FEW_LETTERS, SHORT, LONG, UNEVEN, SCRIPT, DUPLICATE)
SPLITS = ("train", "validation", "test")


class Filters(Record):
    """Which pairs are good enough.

    Attributes:
        minimum_words: of either side; two Chinese or Japanese characters count as a word.
        maximum_words: of either side.
        maximum_ratio: how many times as many words the longer side may have; both sides are counted one word longer
            than they are, so that a word may be translated by a few.
        script_share: least share of words in the script of the language ("zh" in Han, "de" in Latin); 0 for any.
        letter_share: least share of letters among the characters that are no spaces, which formulas and code have few
            of; with 0, a single one is enough.
    """

    minimum_words: int = 1
    maximum_words: int = 100
    maximum_ratio: float = 3.0
    script_share: float = 0.3
    letter_share: float = 0.0

    def check(self) -> None:
        self.require(1 <= self.minimum_words <= self.maximum_words, "should have 1 <= minimum_words <= maximum_words")
        self.require(self.maximum_ratio >= 1, "maximum_ratio should be at least 1")
        for name in ("script_share", "letter_share"):
            self.require(0 <= getattr(self, name) <= 1, f"{name} should be between 0 and 1")

    def fault(self, pair: Pair) -> str | None:
        """Return why the (normalised) pair is left out, or None if it is good."""
        if not pair.source or not pair.target:
            return EMPTY
        if pair.source == pair.target:
            return SAME
        letters = min(letter_share(pair.source), letter_share(pair.target))
        if letters == 0 or letters < self.letter_share:
            return FEW_LETTERS
        shorter, longer = sorted((count_words(pair.source), count_words(pair.target)))
        if math.ceil(shorter) < self.minimum_words:
            return SHORT
        if longer > self.maximum_words:
            return LONG
        if self.uneven(shorter, longer):
            return UNEVEN
        sides = ((pair.source, pair.source_language), (pair.target, pair.target_language))
        if any(script_share(text, language) < self.script_share for text, language in sides):
            return SCRIPT
        return None

    def uneven(self, one: float, other: float) -> bool:
        """Tell whether two numbers of words are too different for a translation."""
        shorter, longer = sorted((one, other))
        return longer + 1 > self.maximum_ratio * (shorter + 1)


class DataRecipe(Record):
    """Which pairs a model is trained, watched and tested on.

    Attributes:
        corpora: where the pairs come from.
        directions: the languages to translate between ("en-de"); several make a many-to-many model.
        filters: which pairs are good enough.
        paragraphs: a pair of paragraphs with as many sentences on both sides can be split into pairs of sentences,
            which are more, shorter, and like what people ask to have translated.
        validation, test: the shares of the pairs that are held out.
        seed: chooses which are held out.
    """

    corpora: tuple[Corpus, ...]
    directions: tuple[str, ...] = ("en-de",)
    filters: Filters = Filters()
    paragraphs: Literal["keep", "split"] = "keep"
    validation: float = 0.02
    test: float = 0.02
    seed: int = 0

    def check(self) -> None:
        self.require(bool(self.corpora), "needs at least one corpus")
        self.require(bool(self.directions), "needs at least one direction")
        self.require(len(set(self.directions)) == len(self.directions), "names a direction twice")
        for direction in self.directions:
            split_direction(direction)
        self.require(min(self.validation, self.test) >= 0, "validation and test should not be negative")
        self.require(
            self.validation + self.test <= 0.5, "validation and test should leave half of the pairs to train on"
        )


@dataclass
class Report:
    """How many pairs of each direction were read, left out (and why), and put into each split.

    Attributes:
        directions: as in the recipe.
        counts: by what happened ("read", a reason, "train", …) and direction.
    """

    directions: tuple[str, ...]
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, what: str, direction: str, number: int = 1) -> None:
        """Count pairs of a direction."""
        self.counts.setdefault(what, Counter())[direction] += number

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table, its head first; a last column adds the directions up where there are several."""
        several = len(self.directions) > 1
        table: list[tuple[str, ...]] = [("pairs", *self.directions, *(["all"] if several else []))]
        for what in (READ, SPLIT, *FAULTS, *SPLITS):
            counted = self.counts.get(what)
            if counted is None:
                continue
            numbers = [counted[direction] for direction in self.directions]
            table.append((what, *(f"{n:,}" for n in (*numbers, *([sum(numbers)] if several else [])))))
        return table

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        first, *rest = widths
        return "\n".join(
            " ".join((row[0].ljust(first), *(cell.rjust(n + 1) for cell, n in zip(row[1:], rest, strict=True))))
            for row in rows
        )


@dataclass
class Splits:
    """Clean pairs: no text of `test` or `validation` stands in another split, on any side."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    report: Report


def prepare(recipe: DataRecipe) -> Splits:
    """Read the corpora, clean and de-duplicate the pairs, and split them.

    The result depends on which pairs there are and on the recipe, not on their order; each split is in an order that
    is as good as random.

    Raises:
        DataError: a corpus can't be read, a direction has no pairs or none that pass the filters, or there are too
            few to hold some out.
    """
    report = Report(recipe.directions)
    pairs = clean(recipe, report)
    for direction in recipe.directions:
        _refuse_none(recipe, report, direction)
    parts = split(pairs, Shares(recipe.validation, recipe.test, recipe.seed))
    for name, part in zip(SPLITS, parts, strict=True):
        report.counts[name] = Counter(pair.direction for pair in part)
    return Splits(*parts, report)


def clean(recipe: DataRecipe, report: Report) -> list[Pair]:
    """Return the normalised pairs that pass the filters, each once, and count in `report` what happened to all."""
    kept: dict[Pair, None] = {}
    for pair in _read(recipe, report):
        fault = DUPLICATE if pair in kept else recipe.filters.fault(pair)
        if fault is None:
            kept[pair] = None
        else:
            report.add(fault, pair.direction)
    return list(kept)


def _read(recipe: DataRecipe, report: Report) -> Iterator[Pair]:
    """Yield the normalised pairs of all corpora, split into sentences if the recipe wants it."""
    for corpus in recipe.corpora:
        for pair in corpus.pairs(recipe.directions):
            report.add(READ, pair.direction)
            pair = pair._replace(source=normalise(pair.source), target=normalise(pair.target))
            if recipe.paragraphs == "keep":
                yield pair
                continue
            split_pair = _split_paragraph(pair, recipe.filters)
            if len(split_pair) > 1:
                report.add(SPLIT, pair.direction, len(split_pair) - 1)
            yield from split_pair


def _split_paragraph(pair: Pair, filters: Filters) -> list[Pair]:
    """Return pairs of sentences, or the pair itself where the sentences don't seem to match one by one."""
    sources, targets = sentences(pair.source), sentences(pair.target)
    if len(sources) != len(targets):
        return [pair]
    both = list(zip(sources, targets, strict=True))
    if any(filters.uneven(count_words(source), count_words(target)) for source, target in both):
        return [pair]
    return [pair._replace(source=source, target=target) for source, target in both]


def _refuse_none(recipe: DataRecipe, report: Report, direction: str) -> None:
    """Raise if no pair of the direction was found, or none was kept."""
    read = report.counts.get(READ, Counter())[direction]
    if read == 0:
        found = sorted({language for corpus in recipe.corpora for language in corpus.available()})
        raise DataError(f"there are no pairs for the direction '{direction}'; the corpora have: {', '.join(found)}")
    dropped = {fault: report.counts[fault][direction] for fault in FAULTS if fault in report.counts}
    if sum(dropped.values()) == read + report.counts.get(SPLIT, Counter())[direction]:
        reasons = ", ".join(f"{fault}: {number:,}" for fault, number in dropped.items() if number)
        raise DataError(f"none of the {read:,} pairs for the direction '{direction}' can be used ({reasons})")
