"""`polyformer bench attention`: its tables, its JSON, its picture, and a sentence for what can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from polyformer.bench import DENSE
from tests.test_cli import say, shell

QUICK = ("--set", "heads=2", "--set", "head=8", "--set", "rounds=2", "--budget", "100")


def bench(*arguments: str | Path, status: int = 0) -> str:
    return say("bench", "attention", *QUICK, *arguments, status=status)


def rows(**properties: Any) -> dict[str, Any]:
    """Return the schema of a list of tables that have just these keys."""
    table = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "minItems": 1, "items": table}


NAME, MODE = {"type": "string"}, {"enum": ["forward", "training"]}
COUNT, COST = {"type": "integer", "minimum": 0}, {"type": "number", "exclusiveMinimum": 0}
MEASURED = rows(
    contestant=NAME,
    length=COUNT,
    mode=MODE,
    seconds=COST,
    times={"type": "array", "items": COST, "minItems": 1},
    bytes=COUNT,
)["items"]
SKIPPED = rows(contestant=NAME, length=COUNT, mode=MODE, skipped=NAME)["items"]
SCHEMA = {
    "type": "object",
    "required": ["machine", "settings", "contestants", "cells", "fits", "crossings", "ratios"],
    "additionalProperties": False,
    "properties": {
        "machine": {
            "type": "object",
            "required": ["system", "processor", "threads", "memory_available", "python", "torch", "polyformer"],
        },
        "settings": {"type": "object", "required": ["lengths", "only", "fit_from", "sizes", "conditions"]},
        "contestants": rows(
            name=NAME,
            kind=NAME,
            rule={"type": "object", "required": ["type"]},
            spec={"type": "object", "required": ["type"]},
            linear_from={"type": ["integer", "null"]},
            dense=NAME,
        ),
        "cells": {"type": "array", "minItems": 1, "items": {"oneOf": [MEASURED, SKIPPED]}},
        "fits": rows(
            contestant=NAME,
            mode=MODE,
            quantity={"enum": ["seconds", "bytes"]},
            exponent={"type": "number"},
            factor=COST,
            points={"type": "integer", "minimum": 2},
            r2={"type": "number", "maximum": 1},
        ),
        "crossings": rows(
            contestant=NAME,
            mode=MODE,
            against={"const": DENSE},
            fitted={"type": ["number", "null"]},
            measured={"type": ["integer", "null"]},
        ),
        "ratios": rows(contestant=NAME, mode=MODE, against=NAME, length=COUNT, times_as_fast=COST),
    },
}


def test_help_has_examples() -> None:
    assert "Example: polyformer bench attention" in " ".join(say("bench", "attention", "--help").split())
    assert "attention" in say("bench", "--help")
    assert "bench" in say("--help")


def test_json() -> None:
    found = json.loads(bench("--lengths", "16,32,8", "--only", "linformer", "--fit-from", "8", "--json"))
    Draft202012Validator(SCHEMA).validate(found)
    assert found["settings"]["lengths"] == [8, 16, 32]
    assert found["settings"]["sizes"] == {"heads": 2, "head": 8, "batch": 1, "dtype": "float32", "level": "kernel"}
    assert len(found["cells"]) == 3 * 3 * 2
    assert {row["against"] for row in found["ratios"] if row["contestant"] == "linformer"} == {DENSE, "sdpa-everyone"}
    fits = [(row["contestant"], row["mode"], row["quantity"]) for row in found["fits"]]
    assert ("linformer", "training", "seconds") in fits
    assert next(c for c in found["contestants"] if c["name"] == "linformer")["spec"]["length"] == 32


def test_skipped_cells_are_in_the_json_too() -> None:
    found = json.loads(
        bench("--lengths", "8,16,2048", "--only", "naive", "--fit-from", "8", "--set", "memory=0.015", "--json")
    )
    Draft202012Validator(SCHEMA).validate(found)
    skipped = [cell for cell in found["cells"] if "skipped" in cell]
    assert {(cell["contestant"], cell["length"]) for cell in skipped} == {("naive", 2048)}


def test_tables() -> None:
    told = bench("--lengths", "8,16,32", "--only", "linformer,performer", "--fit-from", "8")
    for title in ("Time, forward", "Peak memory beside inputs and answers, training step", "Times as fast as sdpa"):
        assert title in told
    for heading in ("grows as", "R²", "faster than sdpa from", "measured"):
        assert heading in told
    line = next(line for line in told.splitlines() if line.startswith("performer"))
    assert "n^" in line
    assert "s  " in line
    ratios = told[told.index("Times as fast") :].splitlines()
    assert "(" in next(line for line in ratios if line.startswith("linformer"))
    assert "not measured" not in told


def test_what_is_left_out_is_said() -> None:
    told = bench("--lengths", "16,2048", "--only", "naive", "--set", "memory=0.015")
    assert "not measured: naive, forward, at 2,048: a run would take about 0.07" in told
    assert "GB of memory, more than the 0.015 GB there are" in told
    assert "no growth is fitted: that takes two lengths, and there is 1 length from 2,048 on (--fit-from)" in told


def test_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "curves.png"
    bench("--lengths", "8,16", "--only", "performer", "--fit-from", "8", "--plot", file)
    first = file.read_bytes()
    assert first.startswith(b"\x89PNG")
    told = bench("--lengths", "8,16", "--only", "performer", "--plot", file, status=1)
    assert told == f"polyformer: {file} exists; replace it with --force, or choose another file\n"
    assert file.read_bytes() == first
    bench("--lengths", "8", "--only", "performer", "--plot", file, "--force")
    assert file.read_bytes() != first
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lengths", "512,many"), "--lengths wants whole numbers, such as 512,1024,2048, not 'many'"),
        (("--lengths", "512,,1024"), "--lengths wants whole numbers, such as 512,1024,2048, not ''"),
        (("--lengths", "0,512"), "lengths must be at least 1, not 0"),
        (("--lengths=-8",), "lengths must be at least 1, not -8"),
        (("--only", "perfromer"), "no attention 'perfromer' to measure (did you mean 'performer'?)"),
        (("--only", "zzz"), "no attention 'zzz' to measure (known: "),
        (("--budget", "0"), "budget must be above 0 seconds, not 0"),
        (("--set", "head"), "--set wants key=value"),
        (("--set", "heds=2"), "--set has no key 'heds' here (did you mean 'heads'?)"),
        (("--set", "budget=2"), "--set has no key 'budget' here"),
        (("--set", "heads=two"), "--set.heads should be a whole number, not 'two'"),
        (("--set", "dtype=float23"), "--set.dtype should be one of"),
        (("--set", "threads=0"), "threads must be at least 1"),
        (("--set", "head=7", "--only", "retention"), "heads of even width"),
        (("--plot", "nowhere/at/all.png"), "nowhere/at/all.png can't be written: No such file or directory"),
        (("--plot", "curves.svg"), "its name should end in .png, not 'curves.svg'"),
    ],
)
def test_what_can_not_be(arguments: tuple[str, ...], told: str) -> None:
    found = bench(*arguments, status=1)
    assert found.startswith("polyformer: ")
    assert told in found
    assert found.count("\n") == 1


def test_a_missing_verb_is_told() -> None:
    assert "No such command 'atention'" in say("bench", "atention", status=2)


def test_standard_error_is_quiet() -> None:
    """Neither the profiler's library nor a warning of PyTorch's writes beside the tables."""
    done = shell("bench", "attention", *QUICK, "--lengths", "8", "--only", "performer", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["cells"]
    assert "USDT" not in done.stderr
    assert "Warning" not in done.stderr
