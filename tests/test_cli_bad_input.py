"""Input that can't be right, as a person at the command line gives it: one sentence, a status, and no traceback."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyformer.cli import app
from tests.native.test_files import file_of
from tests.test_cli_models import sentence, writer
from tests.test_cli_writing import run

LOOPS = {
    "for ever": "{% for i in range(10**9) %}x{% endfor %}",
    "within itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubling": "{% set t = namespace(x='x') %}{% for i in range(99) %}{% set t.x = t.x ~ t.x %}{% endfor %}{{ t.x }}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    writer(folder)
    return folder


@pytest.mark.parametrize("loop", LOOPS)
def test_a_template_that_loops(model: Path, loop: str) -> None:
    config = {"chat_template": LOOPS[loop], "tokenizer_class": "BertTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    begun = time.process_time()
    for told in (run("chat", model, said="the cat\n"), run("generate", model, "the cat", "--chat")):
        assert "template" in sentence(told)
    assert time.process_time() - begun < 60


def test_texts_that_are_none(model: Path) -> None:
    """Half of a character, on the command line and through a pipe."""
    for verb in (("generate", model, "the \ud83d"), ("generate", model, "the", "--stop", "\ud83d")):
        assert "surrogate" in sentence(run(*verb))
    config = {"chat_template": "{{ messages[0]['content'] }}", "tokenizer_class": "BertTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "surrogate" in sentence(run("chat", model, "--system", "\udc00", said="the cat\n"))
    for verb in (["chat", str(model)], ["generate", str(model)]):
        told = CliRunner().invoke(app, verb, input=b"the cat\nthe \xff\n")
        assert "standard input, line 2: not UTF-8 at byte 5" in sentence(told)


@pytest.mark.parametrize("verb", ["generate", "inspect"])
def test_gguf_files_that_are_cut_short(tmp_path: Path, verb: str) -> None:
    whole = file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    chance = random.Random(0)
    for length in (0, 3, 4, 8, 23, 24, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(12))):
        cut.write_bytes(whole[:length])
        assert "cut.gguf" in sentence(run(verb, cut, *(["x"] if verb == "generate" else [])))


@pytest.mark.parametrize("verb", ["generate", "inspect"])
@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "metadata"])
@pytest.mark.parametrize("count", [0, 2**20, 2**62, 2**64 - 1])
def test_gguf_files_with_impossible_counts(tmp_path: Path, verb: str, at: int, count: int) -> None:
    data = bytearray(file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "file.gguf").read_bytes())
    data[at : at + 8] = struct.pack("<Q", count)
    (tmp_path / "file.gguf").write_bytes(data)
    assert "file.gguf" in sentence(run(verb, tmp_path / "file.gguf", *(["x"] if verb == "generate" else [])))
