"""JSON from files that strangers wrote: bounded, and without silent surprises."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from polyformer.errors import WeightsError

LIMIT = 8 * 2**20
"""Bytes of JSON that are read at most: ten times what the largest real headers and indexes need."""


def parse(text: bytes, where: str) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        WeightsError: text that is too long, not UTF-8, not JSON, nested too deeply, not an object, or that has a
            key twice in one object; it names `where`.
    """
    found = _decode(text, where)
    if not isinstance(found, dict):
        raise WeightsError(f"{where} should hold a JSON object, not {type(found).__name__}")
    return found


def read(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; raises `WeightsError` as `parse` does, or if it can't be read."""
    return parse(_bytes(path), str(path))


def read_list(path: Path) -> list[Any]:
    """Read a file that holds one JSON list; raises `WeightsError` in the same way."""
    found = _decode(_bytes(path), str(path))
    if not isinstance(found, list):
        raise WeightsError(f"{path} should hold a JSON list, not {type(found).__name__}")
    return found


def _decode(text: bytes, where: str) -> Any:
    """Read any JSON.

    Python's reader keeps the last of two equal keys and says nothing; here that is an error, since the two could
    describe different tensors to different readers.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
            raise WeightsError(f"{where} has the key '{twice[:100]}' twice; it is damaged or made to mislead")
        return found

    if len(text) > LIMIT:
        raise WeightsError(f"{where} is {len(text):,} bytes of JSON, more than the {LIMIT:,} that are read at most")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise WeightsError(f"{where} is not UTF-8 at byte {error.start}; it is damaged or no such file") from None
    except RecursionError:
        raise WeightsError(f"{where} is nested too deeply to be what it should be") from None
    except json.JSONDecodeError as error:
        raise WeightsError(f"{where} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{where} is not usable JSON: {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(LIMIT + 1)
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from None
    if len(text) > LIMIT:
        raise WeightsError(f"{path} is longer than the {LIMIT:,} bytes of JSON that are read at most")
    return text
