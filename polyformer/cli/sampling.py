"""The options that every verb which writes has: how a text is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.cli.gather import Verb, gathers

if TYPE_CHECKING:
    from polyformer.generate import Sampling

FLAGS: dict[str, Any] = {
    "limit": Annotated[int, typer.Option("--max-tokens", min=1, help="How many tokens are written at most.")],
    "temperature": Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")],
    "top_k": Annotated[int | None, typer.Option(min=1, help="Draw among so many likeliest tokens.")],
    "top_p": Annotated[float | None, typer.Option(help="Draw among the likeliest that add up to this probability.")],
    "min_p": Annotated[float | None, typer.Option(help="Draw among tokens this share as likely as the likeliest.")],
    "repetition_penalty": Annotated[float | None, typer.Option(help="Above 1, what was said is less likely.")],
    "stop": Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What ends the text; repeatable.")],
    "seed": Annotated[int, typer.Option(min=0, help="Of the chance.")],
    "settings": Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Rarer settings, such as typical_p=0.9; repeatable."),
    ],
}
"""The names of options are those of `polyformer.generate.sampling_of`."""

DEFAULTS: dict[str, Any] = {"limit": 64, "temperature": 0.0, "seed": 0}


def samples(**defaults: Any) -> Callable[[Verb], Verb]:
    """Give a verb the options above in place of its parameter `sampling`, which gets what they say together.

    Args:
        defaults: values of options that are not those of `generate`.
    """
    return gathers("sampling", FLAGS, {**DEFAULTS, **defaults}, asked)


def asked(values: dict[str, Any]) -> Sampling:
    """Return what options ask for; raises `SpecError` for what can't be."""
    from polyformer.generate import sampling_of

    table = {name: value for name, value in values.items() if name != "settings" and value not in (None, [])}
    for setting in values["settings"] or []:
        from polyformer.train.reading import apply_setting

        apply_setting(table, setting)
    return sampling_of(table, "--set")
