"""The filters, tests and functions of Jinja that occur in published chat templates, each with its cost counted.

Every filter, method and function takes the budget first; what isn't in these tables can't be called.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from polyformer.data.templates import origin, strings
from polyformer.data.templates.values import (
    POINTER,
    Budget,
    Function,
    Missing,
    Namespace,
    entries,
    fault,
    kind,
    show,
    survey,
)

_DATE = re.compile(r"(?:[^%]|%-?[a-zA-Z%])*")
_LONGEST_RANGE = 100_000
_WIDEST_INDENT = 16
_MOST_DIGITS = 30

Call = Callable[..., Any]


def tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as `json.dumps` writes it; Jinja's own filter would escape it for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= _WIDEST_INDENT):
        fault("tojson can't indent so far")
    was_said = survey(value, budget, indent or 0)
    between = (",", ":") if separators else None
    if separators:
        between = (show(separators[0], budget)[:8], show(separators[1], budget)[:8])
    written = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=between, sort_keys=sort_keys)
    return origin.said(written) if was_said else written


def default(budget: Budget, value: Any, other: Any = "", boolean: bool = False) -> Any:
    """Return `other` in the place of what isn't there, with `boolean` also of what is false."""
    return other if isinstance(value, Missing) or (boolean and not value) else value


def length(budget: Budget, value: Any) -> int:
    """Return the number of characters or entries."""
    return len(value) if isinstance(value, (str, list, tuple, dict, Missing)) else fault(f"{kind(value)} is no list")


def items(budget: Budget, value: Any) -> list[Any]:
    """Return the keys and values of a mapping."""
    if not isinstance(value, (dict, Missing)):
        fault(f"{kind(value)} has no items")
    budget.take(4 * POINTER * len(value))
    return list(value.items()) if isinstance(value, dict) else []


def indent(budget: Budget, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    """Return a text with every line but the first moved to the right."""
    if not isinstance(width, str) and not (isinstance(width, int) and 0 <= width <= 1000):
        fault("a text can't be indented so far")
    text, space = show(value, budget), width if isinstance(width, str) else " " * width
    lines = strings.splitlines(budget, origin.join([text, "\n"]))
    budget.take(len(lines) * (len(space) + POINTER))
    moved = [line if not line and not blank else origin.join([space, line]) for line in lines]
    return origin.join([moved[0] if first else lines[0], *moved[1:]], "\n") if lines else ""


def title(budget: Budget, value: Any) -> str:
    """Return a text whose words begin with capitals."""
    text = show(value, budget)
    budget.take(POINTER * len(text))
    words = re.split(r"([-\s({\[<]+)", text)
    titled: str = origin.whole("".join(word[:1].upper() + word[1:].lower() for word in words), (text,))
    return titled


def to_int(budget: Budget, value: Any, default: Any = 0) -> Any:
    """Return the whole number that a number or text stands for, else `default`."""
    survey(value, budget)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return default


def to_float(budget: Budget, value: Any, default: Any = 0.0) -> Any:
    """Return the number that a text stands for, else `default`."""
    survey(value, budget)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return default


def to_round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> Any:
    """Return a number with `precision` digits after the point, rounded to the nearest, up ("ceil") or down."""
    ways: dict[str, Call] = {"common": round, "ceil": math.ceil, "floor": math.floor}
    if abs(precision) > _MOST_DIGITS or method not in ways:
        fault("a number can't be rounded so")
    return round(value, precision) if method == "common" else ways[method](value * 10**precision) / 10**precision


def total(budget: Budget, value: Any, attribute: Any = None, start: float = 0) -> Any:
    """Return the sum of numbers."""
    numbers = [one if attribute is None else path(budget, one, attribute) for one in entries(value, budget)]
    if not all(isinstance(one, (int, float)) for one in (start, *numbers)):
        fault("only numbers can be summed")
    return sum(numbers, start)


def reverse(budget: Budget, value: Any) -> Any:
    """Return a text or list from its end to its beginning."""
    if isinstance(value, str):
        return origin.whole(value[::-1], (value,))
    return list(entries(value, budget))[::-1]


def path(budget: Budget, value: Any, attribute: Any, missing: Any = None) -> Any:
    """Return `value.a.b` for the attribute `"a.b"`; `missing`, where given, for what isn't there."""
    for name in str(attribute).split("."):
        value = item(budget, value, int(name) if name.isdecimal() else name)
        value = missing if missing is not None and isinstance(value, Missing) else value
    return value


def mapped(budget: Budget, value: Any, name: str = "", *args: Any, **named: Any) -> list[Any]:
    """Return the attribute of each entry, or what the filter `name` makes of it."""
    if "attribute" in named:
        return [path(budget, entry, named["attribute"], named.get("default")) for entry in entries(value, budget)]
    change = named_one(FILTERS, name, "filter")
    return [change(budget, entry, *args, **named) for entry in entries(value, budget)]


def chosen(wanted: bool, by_attribute: bool) -> Call:
    """Make `select`, `reject`, `selectattr` or `rejectattr`."""

    def choose(budget: Budget, value: Any, *args: Any) -> list[Any]:
        attribute, test = (args[:1], args[1:]) if by_attribute else ((), args)
        passes = named_one(TESTS, test[0], "test") if test else lambda budget, value: bool(value)
        found = []
        for entry in entries(value, budget):
            budget.step()
            asked = path(budget, entry, attribute[0]) if attribute else entry
            if bool(passes(budget, asked, *test[1:])) is wanted:
                found.append(entry)
        return found

    return choose


def by_value(case_sensitive: bool) -> Call:
    """Return the key by which Jinja compares: letters of both cases are one unless `case_sensitive`."""
    return lambda value: value.lower() if isinstance(value, str) and not case_sensitive else value


def ordered(
    budget: Budget, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> list[Any]:
    """Return the entries in order."""
    _pay_for_comparing(budget, value)
    key = by_value(case_sensitive)
    return sorted(
        entries(value, budget),
        key=lambda one: key(one if attribute is None else path(budget, one, attribute)),
        reverse=reverse,
    )


def dictsort(
    budget: Budget, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    """Return the keys and values of a mapping in the order of one of them."""
    _pay_for_comparing(budget, value)
    key, at = by_value(case_sensitive), 0 if by == "key" else 1
    return sorted(items(budget, value), key=lambda pair: key(pair[at]), reverse=reverse)


def unique(budget: Budget, value: Any, case_sensitive: bool = False) -> list[Any]:
    """Return the entries without those that came before."""
    key = by_value(case_sensitive)
    if not all(isinstance(one, (str, int, float)) for one in entries(value, budget)):
        fault("only texts and numbers can be made unique")
    _pay_for_comparing(budget, value)
    found: dict[Any, Any] = {}
    for one in entries(value, budget):
        found.setdefault(key(one), one)
    return list(found.values())


def extreme(pick: Call) -> Call:
    """Make `min` or `max`."""

    def find(budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        in_order = ordered(budget, value, False, case_sensitive, attribute)
        return pick(in_order) if in_order else Missing("entry")

    return find


def _pay_for_comparing(budget: Budget, value: Any) -> None:
    before = budget.characters
    survey(value, budget)
    budget.take((before - budget.characters) * 16)


def item(budget: Budget, value: Any, key: Any) -> Any:
    """Return `value[key]`; the key may be the name of a method too."""
    if isinstance(value, (str, list, tuple)) and isinstance(key, int):
        at = key + len(value) if key < 0 else key
        if not 0 <= at < len(value):
            return Missing(str(key))
        return origin.cut(value, at, at + 1) if isinstance(value, str) else value[at]
    if isinstance(value, dict) and is_key(budget, key) and key in value:
        return value[key]
    return field(value, key if isinstance(key, str) else str(type(key)))


def field(value: Any, name: str) -> Any:
    """Return `value.name`: a method that templates may call, else the entry of a mapping."""
    methods = strings.METHODS if isinstance(value, str) else _DICT_METHODS if isinstance(value, dict) else {}
    if name in methods:
        return Function(name, lambda budget, *args, **named: methods[name](budget, value, *args, **named))
    if isinstance(value, Missing):
        fault(f"'{value.name[:80]}' is undefined, so it has no '{name[:80]}'")
    if isinstance(value, dict):
        return value.get(name, Missing(name))
    return value.field(name) if hasattr(value, "field") else Missing(name)


def named_one(table: dict[str, Call], name: Any, what: str) -> Call:
    """Return a filter or test by its name."""
    return table[name] if isinstance(name, str) and name in table else fault(f"there is no {what} '{name!s:.80}' here")


def is_key(budget: Budget, value: Any) -> bool:
    """Tell whether a value may be the key of a mapping: plain ones may, which take no long time to compare."""
    if isinstance(value, str):
        budget.take(len(value))
    return isinstance(value, (str, int, float, type(None)))


def _get(budget: Budget, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return value.get(key, default) if is_key(budget, key) else default


_DICT_METHODS: dict[str, Call] = {
    "get": _get,
    "items": items,
    "keys": lambda budget, value: list(value),
    "values": lambda budget, value: list(value.values()),
}


def _method(name: str) -> Call:
    return lambda budget, value, *args: strings.METHODS[name](budget, show(value, budget), *args)


FILTERS: dict[str, Call] = {
    "abs": lambda budget, value: abs(value),
    "capitalize": _method("capitalize"),
    "center": _method("center"),
    "count": length,
    "d": default,
    "default": default,
    "dictsort": dictsort,
    "first": lambda budget, value: (entries(value, budget) or [Missing("first entry")])[0],
    "float": to_float,
    "format": lambda budget, value, *args, **named: strings.percent(budget, show(value, budget), args or named),
    "indent": indent,
    "int": to_int,
    "items": items,
    "join": lambda budget, value, between="", attribute=None: strings.join(
        budget, show(between, budget), value if attribute is None else mapped(budget, value, attribute=attribute)
    ),
    "last": lambda budget, value: (entries(value, budget) or [Missing("last entry")])[-1],
    "length": length,
    "list": lambda budget, value: list(entries(value, budget)),
    "lower": _method("lower"),
    "map": mapped,
    "max": extreme(lambda found: found[-1]),
    "min": extreme(lambda found: found[0]),
    "reject": chosen(False, False),
    "rejectattr": chosen(False, True),
    "replace": lambda budget, value, *args: strings.replace(budget, show(value, budget), *args),
    "reverse": reverse,
    "round": to_round,
    "safe": lambda budget, value: value,
    "select": chosen(True, False),
    "selectattr": chosen(True, True),
    "sort": ordered,
    "string": lambda budget, value: show(value, budget),
    "sum": total,
    "title": title,
    "tojson": tojson,
    "trim": _method("strip"),
    "unique": unique,
    "upper": _method("upper"),
}


def same(budget: Budget, a: Any, b: Any) -> bool:
    """Tell whether two values are equal, having paid for looking through them."""
    for value in (a, b):
        if isinstance(value, (list, tuple, dict)):
            survey(value, budget)
    if isinstance(a, str) and isinstance(b, str) and len(a) == len(b):
        budget.take(len(a))
    return bool(a == b)


def within(budget: Budget, value: Any, container: Any) -> bool:
    """Tell whether a text or list has `value` in it, or a mapping as a key."""
    if isinstance(container, dict):
        return is_key(budget, value) and value in container
    if isinstance(container, str):
        budget.take(len(container))
        return value in container
    if not isinstance(container, (list, tuple, Missing)):
        fault(f"{kind(container)} has nothing in it")
    return any(same(budget, value, one) for one in entries(container, budget))


def less(budget: Budget, a: Any, b: Any) -> bool:
    """Tell whether one value comes before another."""
    for value in (a, b):
        survey(value, budget)
    return bool(a < b)


TESTS: dict[str, Call] = {
    "boolean": lambda budget, value: isinstance(value, bool),
    "callable": lambda budget, value: isinstance(value, Function),
    "defined": lambda budget, value: not isinstance(value, Missing),
    "divisibleby": lambda budget, value, by: value % by == 0,
    "even": lambda budget, value: value % 2 == 0,
    "false": lambda budget, value: value is False,
    "float": lambda budget, value: isinstance(value, float),
    "in": within,
    "integer": lambda budget, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": lambda budget, value: isinstance(value, (str, list, tuple, dict, Missing)),
    "lower": _method("islower"),
    "mapping": lambda budget, value: isinstance(value, dict),
    "none": lambda budget, value: value is None,
    "number": lambda budget, value: isinstance(value, (int, float)),
    "odd": lambda budget, value: value % 2 == 1,
    "sameas": lambda budget, value, other: value is other,
    "sequence": lambda budget, value: isinstance(value, (str, list, tuple, dict, Missing)),
    "string": lambda budget, value: isinstance(value, str),
    "true": lambda budget, value: value is True,
    "undefined": lambda budget, value: isinstance(value, Missing),
    "upper": _method("isupper"),
    **dict.fromkeys(("==", "eq", "equalto"), same),
    **dict.fromkeys(("!=", "ne"), lambda budget, a, b: not same(budget, a, b)),
    **dict.fromkeys(("<", "lt", "lessthan"), less),
    **dict.fromkeys((">", "gt", "greaterthan"), lambda budget, a, b: less(budget, b, a)),
    **dict.fromkeys(("<=", "le"), lambda budget, a, b: less(budget, a, b) or same(budget, a, b)),
    **dict.fromkeys((">=", "ge"), lambda budget, a, b: less(budget, b, a) or same(budget, a, b)),
}


def _range(budget: Budget, *ends: int) -> list[int]:
    numbers = range(*ends)
    if not numbers or len(numbers) <= _LONGEST_RANGE:
        return list(numbers)
    return fault(f"a range of {len(numbers):,} numbers is too long")


def _strftime_now(budget: Budget, form: str) -> str:
    if len(form) > 200 or not _DATE.fullmatch(form):
        fault("the format of a date is not understood")
    return datetime.datetime.now().strftime(form)


def _raise_exception(budget: Budget, message: Any = "") -> Any:
    fault(f"it refuses these messages: {show(message, budget)[:500]}")


GLOBALS: dict[str, Any] = {
    name: Function(name, run)
    for name, run in {
        "dict": lambda budget, /, *args, **named: dict(*args, **named),
        "namespace": lambda budget, /, *args, **named: Namespace(dict(*args, **named)),
        "raise_exception": _raise_exception,
        "range": _range,
        "strftime_now": _strftime_now,
    }.items()
}
