"""Adapters trained, kept in PEFT's layout, loaded again, merged; on a base that stays what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from polyformer import load
from polyformer.cli import app
from polyformer.data.examples import read_examples
from polyformer.errors import PolyformerError, SpecError, WeightsError
from polyformer.generate import Sampling
from polyformer.loaded.adapted import merged, to_write, with_adapter
from polyformer.train.run import train
from polyformer.weights.folders import check_manifest
from tests.answer.models import bert
from tests.train.test_texts import train_until
from tests.train.test_tune_encoders import labelled
from tests.train.toy_tune import conversations, decoder, tune_recipe, write_jsonl

FAST = {"schedule": {"type": "Cosine", "peak": 2e-2, "warmup": 2}, "checkpoint_minutes": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "Adapt", "change": {"type": "LoraChange", "rank": 4}},
    "dora": {"type": "Adapt", "change": {"type": "DoraChange", "rank": 4}},
    "ia3": {"type": "Adapt", "change": {"type": "Ia3Change"}},
    "prefix": {"type": "Adapt", "change": {"type": "PrefixChange", "tokens": 4}},
    "prompt": {"type": "Adapt", "change": {"type": "PromptChange", "tokens": 4}},
    "qlora": {"type": "Adapt", "change": {"type": "LoraChange", "rank": 4}, "quantised": {"block": 32}},
}

runner = CliRunner()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", conversations())


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tune_recipe(base, data, FAST, method=METHODS["lora"])
    return train(recipe, tmp_path_factory.mktemp("tuned") / "run").folder


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_is_loaded_again(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    folder = train(tune_recipe(base, data, FAST, method=METHODS[method]), tmp_path / "run").folder
    rows = "padded" if method == "prefix" else "apart"  # a prefix would have to stand before each document of a row
    assert f"rows of 64 tokens, {rows}" in (folder / "report.md").read_text()
    check_manifest(folder)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["held_out"]["loss"] < scores["before"]["held_out"]["loss"]
    assert not (folder / "model.safetensors").exists()
    held = load_file(sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert not any(name.endswith(".base.weight") for name in held)
    made = with_adapter(load(base), folder)
    (given,) = made.texts.encode_batch(["What does the house do?"])
    ids = torch.tensor([[*made.before, *given]])
    with torch.no_grad():
        before, after = load(base).model(torch.tensor([given])).logits, made.model(ids).logits[:, len(made.before) :]
    assert not torch.allclose(before, after, atol=1e-3)
    held_out = read_examples(folder / "splits" / "validation.jsonl").rows
    asked = [held_out[i].data["messages"][:-1] for i in (0, len(held_out) // 2)]
    if method != "qlora":  # whose base was rounded when it wrote them
        told = made.chat(asked, Sampling(limit=6))
        assert told == [one["answer"].strip() for one in scores["samples"]]
    if method in ("prefix", "prompt"):
        with pytest.raises(SpecError, match="merge"):
            merged(made)
        return
    with torch.no_grad():
        torch.testing.assert_close(merged(made)[0].model(ids).logits, after, rtol=1e-4, atol=1e-4)


def test_resumed_is_the_undisturbed_run(base: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
    recipe = tune_recipe(base, data, FAST, method=METHODS["lora"])
    train_until(recipe, tmp_path / "run", 8)
    folder = train(recipe, tmp_path / "run", resume=True).folder
    one, other = (load_file(run / "adapter_model.safetensors") for run in (tuned, folder))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it(base: Path, tuned: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the package peft")
    transformers = pytest.importorskip("transformers")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(str(base)), str(tuned))
    made = with_adapter(load(base), tuned)
    ids = torch.tensor([made.texts.encode("What does the house do?")])
    with torch.no_grad():
        torch.testing.assert_close(made.model(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_trained_whole(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bert(tmp_path / "bert", "BertModel")
    file = write_jsonl(tmp_path / "x.jsonl", labelled())
    recipe = tune_recipe(tmp_path / "bert", file, FAST, method=METHODS["lora"], batch={"length": 12, "tokens": 96})
    folder = train(recipe, tmp_path / "run").folder
    scores = json.loads((folder / "scores.json").read_text())
    made = with_adapter(load(tmp_path / "bert"), folder)
    assert made.labels == ("cat", "dog")
    given = [one["given"] for one in scores["samples"]]
    assert [one[0].label for one in made.classify(given)] == [one["answer"] for one in scores["samples"]]
    told = runner.invoke(app, ["classify", str(tmp_path / "bert"), "the cat", "--adapter", str(folder), "--json"])
    assert {one["label"] for one in json.loads(told.stdout)["labels"]} == {"cat", "dog"}
    ia3 = tune_recipe(tmp_path / "bert", file, FAST, method=METHODS["ia3"], batch={"length": 12, "tokens": 96})
    assert train(ia3, tmp_path / "ia3").finished


def test_written_merged_and_natively(base: Path, tuned: Path) -> None:
    made = to_write(with_adapter(load(base), tuned))
    assert not any("adapters" in name for name, _ in made.model.named_parameters())
    assert made.generate(["The house"]) == with_adapter(load(base), tuned).generate(["The house"])


def test_another_base(data: Path, tuned: Path, tmp_path: Path) -> None:
    other = decoder(tmp_path, hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(PolyformerError, match="trained on another base"):
        with_adapter(load(other), tuned)
    with pytest.raises(WeightsError, match="holds no adapter"):
        with_adapter(load(other), tmp_path)


def test_commands(base: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
    def say(*arguments: str | Path, status: int = 0) -> str:
        result = runner.invoke(app, [str(one) for one in arguments])
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    assert f"polyformer chat {base} --adapter {tuned}" in (tuned / "report.md").read_text()
    told = json.loads(say("merge", base, tuned, "--out", tmp_path / "merged", "--json"))
    assert told["drift"]["largest"] < 1e-3
    assert (tmp_path / "merged" / "config.json").exists()
    assert "exists" in say("merge", base, tuned, "--out", tmp_path / "merged", status=1)
    apart = say("generate", base, "The house", "--adapter", tuned, "--max-tokens", "6", "--weights", "pytorch")
    assert apart == say("generate", tmp_path / "merged", "The house", "--max-tokens", "6")
    assert apart == say("generate", base, "The house", "--adapter", tuned, "--max-tokens", "6")
    (tmp_path / "t.txt").write_text("The house sees the river.\n")
    losses = [
        json.loads(say("evaluate", *model, "--data", tmp_path / "t.txt", "--json"))["held_out"]["loss"]
        for model in ((base,), (base, "--adapter", tuned), (tmp_path / "merged",))
    ]
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    short = ["--set", "train.budget={type='Steps', count=2}", "--set", "batch.length=64", "--set", "report.samples=0"]
    say("tune", base, "--data", data, "--out", tmp_path / "q", "--method", "qlora", *short)
    assert (tmp_path / "q" / "adapter_config.json").exists()
    wrong = ["--set", "method.change.targets=['nothing']"]
    told = say("tune", base, "--data", data, "--out", tmp_path / "x", "--method", "lora", *wrong, status=1)
    assert "matches no matrix" in told
    wrong = ["--set", "method.change.rank=0"]
    told = say("tune", base, "--data", data, "--out", tmp_path / "x", "--method", "lora", *wrong, status=1)
    assert "a rank of 0 changes nothing" in told
    assert not (tmp_path / "x").exists()
