"""Recipes of every kind, read from TOML and changed by settings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from polyformer.errors import RunError, SpecError
from polyformer.spec import Record, json_schema
from polyformer.train.recipe import Job, Recipe


def read_recipe(path: Path, settings: list[str] | None = None) -> Job:
    """Read a recipe and change it by `key=value` settings, such as `train.budget.count=2`.

    Its `type` says which kind it is: `Recipe`, of sentence pairs, where it says nothing, or `TextRecipe`.

    A value is read as TOML (`3`, `true`, `["en-de"]`, `{type = "Steps", count = 100}`); what is none is text. A
    number in a key counts into a list: `data.corpora.0.path=pairs.tsv`.

    Raises:
        SpecError: a misspelt key, a value of the wrong kind, a setting without `=`.
        RunError: the file can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"the recipe {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"the recipe {path} is not UTF-8 at byte {error.start}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"the recipe {path} is not TOML: {error}") from None
    for setting in settings or []:
        apply_setting(data, setting)
    return recipe_of(data, path.name)


def recipe_of(data: dict[str, Any], where: str) -> Job:
    """Read a recipe of whichever kind from plain data; raises `SpecError` as `read_recipe` does."""
    return Job.from_data({"type": Recipe.__name__, **data}, where)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of all kinds of recipes; one that doesn't say its type is a `Recipe`."""
    made = json_schema(Job)
    return {**{key: value for key, value in made.items() if key != "$ref"}, "anyOf": [_ref(Recipe), _ref(Job)]}


def _ref(cls: type[Record]) -> dict[str, str]:
    return {"$ref": f"#/$defs/{cls.__name__}"}


def apply_setting(data: dict[str, Any], setting: str) -> None:
    """Change `data` in place by one `key=value`."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set wants key=value, such as train.seed=1, not '{setting}'")
    *path, last = key.strip().split(".")
    at: Any = data
    for name in path:
        at = at[_place(at, name, setting)] if isinstance(at, list) else at.setdefault(name, {})
        if not isinstance(at, (dict, list)):
            raise SpecError(f"--set {setting}: '{name}' holds a value, not a table")
    at[_place(at, last, setting) if isinstance(at, list) else last] = _value(text.strip())


def _place(items: list[Any], name: str, setting: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise SpecError(f"--set {setting}: '{name}' is not a place in a list of {len(items)}")
    return int(name)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
