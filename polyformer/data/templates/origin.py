"""Strings that know which of their characters somebody said.

A chat template mixes its own text with that of the messages. Only what the template wrote itself may become a control
token, so the parts that came from messages are carried along: through joining, cutting, splitting and replacing
exactly, and through everything else (upper case, JSON) by counting the whole result as said.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[int, int]


class Text(str):
    """A string some of whose characters were said; every operation of `str` on it gives a plain string.

    Attributes:
        said: the parts from messages as (start, stop), in order, neither empty nor touching each other.
    """

    __slots__ = ("said",)
    said: tuple[Span, ...]


def said(text: str) -> str:
    """Return `text` as said from the first to the last character."""
    return _made(text, ((0, len(text)),) if text else ())


def spans(text: str) -> tuple[Span, ...]:
    """Return which parts of `text` were said."""
    return text.said if isinstance(text, Text) else ()


def whole(value: Any, sources: Iterable[Any]) -> Any:
    """Return a value made of `sources` in some way; if one of them was said, every string in it counts as said."""
    if not any(was_said(source) for source in sources):
        return value
    if isinstance(value, str):
        return said(value)
    if isinstance(value, (list, tuple)):
        return type(value)(said(item) if isinstance(item, str) else item for item in value)
    return value


def was_said(value: Any) -> bool:
    """Tell whether a string, or one directly in a list or tuple, was said in part."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, Text) for item in value)
    return isinstance(value, Text)


def cut(text: str, start: int, stop: int) -> str:
    """Return `text[start:stop]` for 0 ≤ start ≤ stop."""
    parts, found = spans(text), []
    for number in range(max(bisect.bisect_left(parts, (start,)) - 1, 0), len(parts)):
        a, b = max(parts[number][0], start), min(parts[number][1], stop)
        if parts[number][0] >= stop:
            break
        if a < b:
            found.append((a - start, b - start))
    return _made(text[start:stop], tuple(found))


def join(parts: Sequence[str], between: str = "") -> str:
    """Return the parts as one string with `between` between them."""
    joined = between.join(parts)
    if not isinstance(between, Text) and not any(isinstance(part, Text) for part in parts):
        return joined
    found: list[Span] = []
    at = 0
    for number, part in enumerate(parts):
        for piece in (between, part) if number else (part,):
            for start, stop in spans(piece):
                if found and found[-1][1] == at + start:
                    found[-1] = (found[-1][0], at + stop)
                else:
                    found.append((at + start, at + stop))
            at += len(piece)
    return _made(joined, tuple(found))


def strip(text: str, characters: str | None = None, left: bool = True, right: bool = True) -> str:
    """Return `text` without white space, or without `characters`, at its ends."""
    start = len(text) - len(text.lstrip(characters)) if left else 0
    stop = len(text.rstrip(characters)) if right else len(text)
    return cut(text, start, max(start, stop))


def pieces(text: str, parts: Sequence[str], between: int = 0) -> list[str]:
    """Return `parts`, which stand in `text` in this order, with their origin.

    Args:
        between: how many characters at least stand between one and the next.
    """
    if not isinstance(text, Text):
        return list(parts)
    found = []
    at = 0
    for part in parts:
        start = text.find(part, at)
        found.append(cut(text, start, start + len(part)))
        at = start + len(part) + between
    return found


def replace(text: str, old: str, new: str, count: int = -1) -> str:
    """Return `text.replace(old, new, count)`."""
    if not old:
        replaced: str = whole(text.replace(old, new, count), (text, new))
        return replaced
    return join(pieces(text, text.split(old, count), len(old)), new)


def _made(text: str, parts: tuple[Span, ...]) -> str:
    if not parts:
        return str(text)
    made = Text(text)
    made.said = parts
    return made
