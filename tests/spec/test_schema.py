"""The JSON Schema accepts every file that we write and refuses broken ones."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given

from polyformer.parts import Attention, Embed, Linear, Stack, Transformer
from polyformer.spec import Record, Spec, json_schema
from tests.spec.trees import SAMPLES, block, translator, trees

jsonschema = pytest.importorskip("jsonschema")


@functools.cache
def validator(cls: type[Record]) -> Any:
    schema = json_schema(cls)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


@given(trees())
def test_every_file_we_write_is_valid(tree: Record) -> None:
    validator(Spec).validate(json.loads(tree.to_json()))
    validator(type(tree)).validate(tree.to_data())


@pytest.mark.parametrize("cls", list(SAMPLES), ids=lambda cls: cls.__name__)
def test_every_part_is_valid(cls: type[Spec]) -> None:
    validator(cls).validate(json.loads(SAMPLES[cls].to_json()))


def _without(data: dict[str, Any], *path: str | int) -> dict[str, Any]:
    copy = json.loads(json.dumps(data))
    at = copy
    for step in path[:-1]:
        at = at[step]
    del at[path[-1]]
    return copy


def _with(data: dict[str, Any], value: Any, *path: str | int) -> dict[str, Any]:
    copy = json.loads(json.dumps(data))
    at = copy
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return copy


ATTENTION = SAMPLES[Attention].to_data()
STACK = Stack((block(),) * 3).to_data()


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (Linear, {"inputs": 1}),
        (Linear, {"inputs": 1, "outputs": "2"}),
        (Linear, {"inputs": 1, "outputs": 2, "bais": True}),
        (Linear, {"type": "LayerNorm", "inputs": 1, "outputs": 2}),
        (Attention, _without(ATTENTION, "heads")),
        (Attention, _without(ATTENTION, "q", "type")),
        (Attention, _with(ATTENTION, "Linaer", "q", "type")),
        (Attention, _with(ATTENTION, 1, "q", "qqq")),
        (Attention, _with(ATTENTION, {"type": "Linear", "inputs": 1, "outputs": 1}, "see")),
        (Attention, _with(ATTENTION, 2.5, "heads", "count")),
        (Stack, _with(STACK, "three", "blocks", 0, "repeat")),
        (Stack, _with(STACK, 0, "blocks", 0, "repeat")),
        (Stack, _with(STACK, [], "blocks", 0, "of")),
        (Stack, _with(STACK, 1, "blocks", 0, "more")),
        (Embed, {"tokens": {}}),
        (Embed, {"tokens": {"type": "Spec"}}),
        (Embed, {"tokens": {"type": "Add"}, "positions": {"type": "Position", "width": 3}}),
        (Transformer, _with(translator().to_data(), ["x"], "ties")),
        (Transformer, []),
    ],
)
def test_broken_files_are_refused_by_schema_and_reader(cls: type[Record], data: Any) -> None:
    from polyformer.errors import SpecError

    with pytest.raises(jsonschema.ValidationError):
        validator(cls).validate(data)
    with pytest.raises(SpecError):
        cls.from_data(data)


def test_it_describes_what_it_names() -> None:
    schema = json_schema(Transformer)
    assert schema["$ref"] == "#/$defs/Transformer"
    assert schema["$defs"]["Linear"]["description"].startswith("y = x Wᵀ + b")
    assert schema["$defs"]["Sinusoidal"]["properties"]["layout"] == {"enum": ["interleaved", "halves"]}
