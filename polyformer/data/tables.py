"""Sentence pairs in a person's own files: tab-separated, JSON Lines, or parallel text files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from polyformer.data.corpus import Rows
from polyformer.data.files import text_lines
from polyformer.data.pairs import json_texts
from polyformer.errors import DataError


class Tsv(Rows):
    """A UTF-8 file with one row on each line, its columns separated by tabs; there is no quoting and no header.

    A blank line counts as a pair with empty sides, which cleaning drops and reports.
    """

    path: str
    languages: tuple[str, ...] = ("en", "de")

    def available(self) -> tuple[str, ...]:
        return self.languages

    def rows(self) -> Iterator[tuple[str, ...]]:
        empty = ("",) * len(self.languages)
        for number, line in text_lines(self.path):
            columns = tuple(line.split("\t")) if line.strip() else empty
            if len(columns) != len(self.languages):
                raise DataError(
                    f"{self.path}, line {number}: has {line.count(chr(9))} tabs; with {len(self.languages)} columns "
                    f"({', '.join(self.languages)}) there should be {len(self.languages) - 1}"
                )
            yield columns


class Jsonl(Rows):
    """A UTF-8 file with one JSON object on each line, which holds a source and a target text."""

    path: str
    source_key: str = "source"
    target_key: str = "target"
    languages: tuple[str, str] = ("en", "de")

    def available(self) -> tuple[str, ...]:
        return self.languages

    def rows(self) -> Iterator[tuple[str, ...]]:
        for number, line in text_lines(self.path):
            if line.strip():
                yield tuple(json_texts(self.path, number, line, (self.source_key, self.target_key)))


class Parallel(Rows):
    """Two UTF-8 text files, of which line n of the one translates line n of the other."""

    source: str
    target: str
    languages: tuple[str, str] = ("en", "de")

    def available(self) -> tuple[str, ...]:
        return self.languages

    def rows(self) -> Iterator[tuple[str, ...]]:
        ours, theirs = text_lines(self.source), text_lines(self.target)
        for one, other in itertools.zip_longest(ours, theirs):
            if one is None or other is None:
                number = (one or other)[0]
                total = number + sum(1 for _ in (ours if other is None else theirs))
                longer, shorter = (self.source, self.target) if other is None else (self.target, self.source)
                raise DataError(
                    f"{longer} has {total:,} lines, but {shorter} has {number - 1:,}; "
                    "line n of the one should translate line n of the other"
                )
            yield one[1], other[1]
