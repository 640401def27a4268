"""Corpora: where sentence pairs come from. A corpus is a record in a recipe; a new kind is a new subclass."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from polyformer.data.pairs import Pair, split_direction
from polyformer.spec import Record


class Corpus(Record, abstract=True):
    """A source of sentence pairs, as they were found: nothing is normalised or left out yet."""

    def available(self) -> tuple[str, ...]:
        """Return the languages that the corpus has; raises `DataError` if it can't be read."""
        raise NotImplementedError

    def pairs(self, directions: Sequence[str]) -> Iterator[Pair]:
        """Yield the pairs of those directions ("en-de") that the corpus has; the others yield nothing.

        Raises:
            SpecError: a direction that is no pair of languages.
            DataError: the corpus can't be read; names file, line and byte.
        """
        raise NotImplementedError


class Rows(Corpus, abstract=True):
    """A corpus that stands row by row in files, with one column for each of its languages."""

    def check(self) -> None:
        columns = self.available()
        self.require(len(columns) >= 2, "languages should name at least two columns")
        self.require(len(set(columns)) == len(columns), "languages should name each column differently")

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the texts of one row after the other, in the order of `available()`."""
        raise NotImplementedError

    def pairs(self, directions: Sequence[str]) -> Iterator[Pair]:
        column = {language: i for i, language in enumerate(self.available())}
        wanted = [split_direction(direction) for direction in directions]
        wanted = [(source, target) for source, target in wanted if source in column and target in column]
        for row in self.rows() if wanted else ():
            for source, target in wanted:
                yield Pair(row[column[source]], row[column[target]], source, target)


class Aligned(Corpus, abstract=True):
    """A corpus whose texts stand apart for each language and meet by a key, so that any two can be paired."""

    def texts(self, languages: frozenset[str]) -> Mapping[str, Mapping[Hashable, str]]:
        """Return, for each of `languages` that the corpus has, its texts by key."""
        raise NotImplementedError

    def pairs(self, directions: Sequence[str]) -> Iterator[Pair]:
        wanted = [split_direction(direction) for direction in directions]
        texts = self.texts(frozenset(language for direction in wanted for language in direction))
        for source, target in wanted:
            others = texts.get(target, {})
            for key, text in texts.get(source, {}).items():
                if key in others:
                    yield Pair(text, others[key], source, target)
