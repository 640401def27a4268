"""Options that several verbs have, gathered into one parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Verb = Callable[..., None]


def gathers(
    parameter: str, flags: Mapping[str, Any], values: Mapping[str, Any], make: Callable[[dict[str, Any]], Any]
) -> Callable[[Verb], Verb]:
    """Give a verb options in place of its one parameter, which gets what they say together.

    Args:
        flags: the options' annotations, by their names.
        values: their defaults; None where nothing is said.
        make: what the parameter gets, of the options' values.
    """

    def change(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def call(**given: Any) -> None:
            verb(**{parameter: make({name: given.pop(name) for name in flags})}, **given)

        own = inspect.signature(verb, eval_str=True).parameters.values()
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=values.get(name), annotation=kind)
            for name, kind in flags.items()
        ]
        kept = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own if one.name != parameter]
        first = [one for one in kept if one.default is inspect.Parameter.empty]
        rest = [one for one in kept if one.default is not inspect.Parameter.empty]
        call.__signature__ = inspect.Signature([*first, *rest, *options])  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in (*first, *rest, *options)}
        return call

    return change
