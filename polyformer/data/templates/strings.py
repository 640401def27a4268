"""The methods of strings that templates may call; what they give keeps its origin."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from polyformer.data.templates import origin
from polyformer.data.templates.values import POINTER, Budget, Missing, entries, fault, kind, show, survey

_PERCENT = re.compile(r"%(?:\((?P<name>\w+)\))?(?P<width>[-0 +#]*\d{0,3}(?:\.\d{1,3})?)(?P<kind>[sdifrgx%])")
_BRACES = re.compile(r"\{\{|\}\}|\{(?P<name>\w*)\}")


def join(budget: Budget, between: str, parts: Any) -> str:
    """Return the entries of `parts`, printed, with `between` between them."""
    shown = [show(part, budget) for part in entries(parts, budget)]
    budget.take(sum(map(len, shown)) + (len(between) + POINTER) * len(shown))
    return origin.join(shown, between)


def replace(budget: Budget, text: str, old: Any, new: Any, count: int = -1) -> str:
    """Return `text` with `new` in the place of each `old`, of the first `count` of them if that is given."""
    old, new = show(old, budget), show(new, budget)
    found = text.count(old)
    budget.take(len(text) + (found if count is None or count < 0 else min(found, count)) * (len(new) + POINTER))
    return origin.replace(text, old, new, -1 if count is None else count)


def strip(budget: Budget, text: str, characters: str | None = None) -> str:
    """Return `text` without what stands at its ends."""
    return _stripped(budget, text, characters, True, True)


def _stripped(budget: Budget, text: str, characters: str | None, left: bool, right: bool) -> str:
    budget.take(len(text) + len(characters or ""))
    return origin.strip(text, characters, left, right)


def split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    """Return the parts of `text` between white space or `sep`."""
    _count_parts(budget, text, sep)
    return origin.pieces(text, text.split(sep, maxsplit), len(sep or ""))


def rsplit(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    """Return the parts of `text` between white space or `sep`, of which the last are cut off first."""
    _count_parts(budget, text, sep)
    return origin.pieces(text, text.rsplit(sep, maxsplit), len(sep or ""))


def splitlines(budget: Budget, text: str, keepends: bool = False) -> list[str]:
    """Return the lines of `text`."""
    budget.take((1 + POINTER) * len(text))
    return origin.pieces(text, text.splitlines(keepends))


def partition(budget: Budget, text: str, sep: str) -> list[str]:
    """Return what stands before the first `sep`, it, and the rest."""
    budget.take(2 * len(text))
    return origin.pieces(text, text.partition(sep))


def rpartition(budget: Budget, text: str, sep: str) -> list[str]:
    """Return what stands before the last `sep`, it, and the rest."""
    budget.take(2 * len(text))
    return origin.pieces(text, text.rpartition(sep))


def removeprefix(budget: Budget, text: str, prefix: str) -> str:
    """Return `text` without `prefix` if it starts with it."""
    return origin.cut(text, len(prefix) if text.startswith(prefix) else 0, len(text))


def removesuffix(budget: Budget, text: str, suffix: str) -> str:
    """Return `text` without `suffix` if it ends with it."""
    return origin.cut(text, 0, len(text) - (len(suffix) if text.endswith(suffix) else 0))


def percent(budget: Budget, text: str, values: Any) -> str:
    """Return `text % values`, with fields less than a thousand wide."""
    several = isinstance(values, (tuple, dict))
    rest = iter(values if several else (values,))

    def write(found: re.Match[str]) -> str:
        if found["kind"] == "%":
            return "%"
        value = values[found["name"]] if found["name"] else next(rest, Missing("format"))
        if found["kind"] == "s" and not found["width"]:
            return show(value, budget)
        if not isinstance(value, (str, int, float)):
            fault(f"'{found[0]}' can't write {kind(value)}")
        written: str = origin.whole(f"%{found['width']}{found['kind']}" % (value,), (value,))
        return written

    return _filled(budget, text, _PERCENT, "%", write)


def braces(budget: Budget, text: str, /, *values: Any, **named: Any) -> str:
    """Return `text.format(...)`, with fields that are names or numbers only."""
    rest = iter(values)

    def write(found: re.Match[str]) -> str:
        name = found["name"]
        if name is None:
            return found[0][0]
        if not name:
            return show(next(rest, Missing("format")), budget)
        return show(values[int(name)] if name.isdecimal() else named[name], budget)

    return _filled(budget, text, _BRACES, "{}", write)


def _filled(
    budget: Budget, text: str, field: re.Pattern[str], marks: str, write: Callable[[re.Match[str]], str]
) -> str:
    parts: list[str] = []
    at = 0
    for found in field.finditer(text):
        parts += [origin.cut(text, at, found.start()), write(found)]
        at = found.end()
    parts.append(origin.cut(text, at, len(text)))
    if any(mark in literal for literal in parts[::2] for mark in marks):
        fault("a format is not understood")
    return join(budget, "", parts)


def _count_parts(budget: Budget, text: str, sep: str | None) -> None:
    most = text.count(sep) if sep else len(text) // 2
    budget.take(len(text) + POINTER * most)


def _padded(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def pad(budget: Budget, text: str, width: int = 80, *fill: str) -> str:
        budget.take(max(width, 0))
        padded: str = origin.whole(method(text, width, *fill), (text, *fill))
        return padded

    return pad


def _followed(name: str) -> Callable[..., Any]:
    """Make a function of a method whose result can't be followed character by character."""
    method = getattr(str, name)

    def call(budget: Budget, text: str, *args: Any) -> Any:
        budget.take(len(text))
        survey(args, budget)
        return origin.whole(method(text, *args), (text, *args))

    return call


METHODS: dict[str, Callable[..., Any]] = {
    "format": braces,
    "join": join,
    "lstrip": lambda budget, text, characters=None: _stripped(budget, text, characters, True, False),
    "partition": partition,
    "removeprefix": removeprefix,
    "removesuffix": removesuffix,
    "replace": replace,
    "rpartition": rpartition,
    "rsplit": rsplit,
    "rstrip": lambda budget, text, characters=None: _stripped(budget, text, characters, False, True),
    "split": split,
    "splitlines": splitlines,
    "strip": strip,
    **{name: _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    **{
        name: _followed(name)
        for name in [
            "capitalize",
            "casefold",
            "count",
            "endswith",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "isidentifier",
            "islower",
            "isnumeric",
            "isspace",
            "istitle",
            "isupper",
            "lower",
            "rfind",
            "rindex",
            "startswith",
            "swapcase",
            "title",
            "upper",
        ]
    },
}
