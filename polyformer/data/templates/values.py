"""What a template computes with: plain JSON values and a few things of its own, all of them counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from polyformer.data.templates.origin import Text, cut, said

POINTER = 8  # what an entry of a list, or a string however short, costs in characters
LARGEST_INT = 256  # bits


class TemplateError(Exception):
    """Something that a template may not do; who walks it adds the name and the line."""


def fault(message: str) -> NoReturn:
    """Raise `TemplateError`, also from within an expression."""
    raise TemplateError(message)


class Budget:
    """What a template may still use up: steps of the walk, and characters of what it reads and makes.

    Whatever costs more than a step is paid for in characters *before* it is done, so that neither time nor memory can
    grow past the budget; and since it counts what the template does, it is the same on every machine.
    """

    def __init__(self, steps: int, characters: int) -> None:
        self.steps, self.characters = steps, characters

    def step(self) -> None:
        """Count one step; raises `TemplateError` when there were too many."""
        self.steps -= 1
        if self.steps < 0:
            fault("it takes more steps than it may")

    def take(self, characters: int) -> None:
        """Count characters that are made or read; raises `TemplateError` when they are too many."""
        self.characters -= characters
        if self.characters < 0:
            fault("it makes or reads more text than it may")


class Missing:
    """The value of what isn't there: empty when printed, tested or gone through, and no operand of anything."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Missing)

    def __hash__(self) -> int:
        return hash(Missing)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __str__(self) -> str:
        return ""

    def __repr__(self) -> str:
        return "Undefined"


class Namespace:
    """What `namespace(...)` gives: the only thing that a loop can change for what comes after it."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def __repr__(self) -> str:
        return "<Namespace>"

    def field(self, name: str) -> Any:
        """Return one of its fields."""
        return self.fields.get(name, Missing(name))


class Function:
    """Something that a template can call; it is handed the budget first."""

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self.run = name, run

    def __repr__(self) -> str:
        return f"<function {self.name}>"


class Loop:
    """The variable `loop`: where in its list a `for` stands."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items, self.index0 = items, 0

    def __repr__(self) -> str:
        return f"<LoopContext {self.index0 + 1}/{len(self.items)}>"

    def field(self, name: str) -> Any:
        """Return one of its fields."""
        at, length = self.index0, len(self.items)
        fields: dict[str, Any] = {
            "index": at + 1,
            "index0": at,
            "revindex": length - at,
            "revindex0": length - at - 1,
            "first": at == 0,
            "last": at == length - 1,
            "length": length,
            "depth": 1,  # which only recursive loops would change
            "depth0": 0,
            "previtem": self.items[at - 1] if at else Missing(name),
            "nextitem": self.items[at + 1] if at + 1 < length else Missing(name),
            "cycle": Function(name, lambda budget, *options: options[at % len(options)]),
        }
        return fields.get(name, Missing(name))


def survey(value: Any, budget: Budget, indent: int = 0, depth: int = 1) -> bool:
    """Count a value with all that is in it, as often as it stands there; tell whether any of it was said.

    Args:
        indent: characters by which what is inside will be indented when the value is written.
    """
    budget.take(POINTER + indent * depth)
    if isinstance(value, str):
        budget.take(len(value))
        return isinstance(value, Text)
    inside: Sequence[Any] = ()
    if isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, (list, tuple)):
        inside = value
    found = False
    for item in inside:
        found |= survey(item, budget, indent, depth + 1)
    return found


def made(value: Any, budget: Budget) -> Any:
    """Count what an operation gave, but not what is in it; refuse numbers that are out of all proportion."""
    if isinstance(value, str):
        budget.take(POINTER + len(value))
    elif isinstance(value, (list, tuple, dict)):
        budget.take(POINTER + POINTER * len(value))
    elif isinstance(value, int) and value.bit_length() > LARGEST_INT:
        fault("a number is too large")
    return value


def show(value: Any, budget: Budget) -> str:
    """Return a value as a template prints it."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)):
        return said(repr(value)) if survey(value, budget) else repr(value)
    return str(value)


def entries(value: Any, budget: Budget) -> Sequence[Any]:
    """Return what a loop over `value` goes through."""
    if isinstance(value, (list, tuple)):
        budget.take(POINTER * len(value))
        return value
    if isinstance(value, str):
        budget.take(2 * POINTER * len(value))
        return [cut(value, i, i + 1) for i in range(len(value))]
    if isinstance(value, (dict, Missing)):
        return list(made(list(value), budget))
    return fault(f"{kind(value)} can't be gone through")


def kind(value: Any) -> str:
    """Return what to call a value in a message."""
    return f"the missing '{value.name[:80]}'" if isinstance(value, Missing) else f"a {type(value).__name__.lower()}"
