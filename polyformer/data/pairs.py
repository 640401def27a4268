"""A sentence pair, and the directions that pairs are read in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from polyformer.data.files import text_lines
from polyformer.errors import DataError, SpecError

_LANGUAGE = r"[A-Za-z]{2,3}(?:_[A-Za-z0-9]+)*"
_DIRECTION = re.compile(rf"({_LANGUAGE})-({_LANGUAGE})")


class Pair(NamedTuple):
    """A text and its translation; languages are codes such as "de", "pt_BR" or "zh" (in simplified characters)."""

    source: str
    target: str
    source_language: str
    target_language: str

    @property
    def direction(self) -> str:
        """The languages as a recipe writes them: "en-de"."""
        return f"{self.source_language}-{self.target_language}"


def split_direction(direction: str) -> tuple[str, str]:
    """Return the two languages of a direction: "en-de" -> ("en", "de").

    Raises:
        SpecError: `direction` is not two different language codes with a hyphen between them.
    """
    found = _DIRECTION.fullmatch(direction)
    if found is None or found[1] == found[2]:
        raise SpecError(f"a direction is two languages such as 'en-de' or 'en-pt_BR', not '{direction}'")
    return found[1], found[2]


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write JSON Lines, an object with the four fields of `Pair` on each line; `read_pairs` reads it."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(pair._asdict(), ensure_ascii=False) + "\n")


def read_pairs(path: Path) -> list[Pair]:
    """Read what `write_pairs` wrote.

    Raises:
        DataError: the file can't be read, or a line is no such object; names the line.
    """
    return [Pair(*json_texts(path, number, line, Pair._fields)) for number, line in text_lines(path) if line.strip()]


def json_texts(path: Path | str, number: int, line: str, keys: Iterable[str]) -> Iterator[str]:
    """Yield the texts that stand under `keys` in the JSON object on this line.

    Raises:
        DataError: no JSON, no object, a key that is not there, or a value that is no text.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: no valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: should be an object such as {{"source": …, "target": …}}')
    for key in keys:
        if key not in row:
            raise DataError(
                f"{path}, line {number}: lacks the key '{key}' (it has: {', '.join(sorted(row)) or 'none'})"
            )
        if not isinstance(row[key], str):
            raise DataError(f"{path}, line {number}: '{key}' should be text, not {type(row[key]).__name__}")
        yield row[key]
