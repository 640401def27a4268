"""Tuning a model that is there: the reference's losses and gradients, runs that go on bit for bit, their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from polyformer import load
from polyformer.cli import app
from polyformer.data.examples import Example, read_examples
from polyformer.data.turns import Renderer, TurnRecipe, TurnRows, encode_turns
from polyformer.errors import PolyformerError, RunError
from polyformer.judge import held_out_loss
from polyformer.train.journal import read_metrics
from polyformer.train.objectives import batch_loss
from polyformer.train.run import train
from polyformer.weights.folders import check_manifest
from tests.train.test_texts import assert_same_run, train_until
from tests.train.toy_tune import conversations, decoder, tune_recipe, write_jsonl

OFTEN = {"checkpoint_minutes": 0.0}
STEPS = {**OFTEN, "budget": {"type": "Steps", "count": 4}}

runner = CliRunner()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", conversations())


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tune_recipe(base, data, OFTEN), tmp_path_factory.mktemp("tuned") / "run").folder


def test_loss_and_gradients_are_those_of_the_reference(base: Path) -> None:
    """Held against the reference's loss with labels of -100, one conversation at a time."""
    transformers = pytest.importorskip("transformers")
    loaded = load(base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(base)).eval()
    renderer = Renderer(loaded.texts, "chat")
    examples = [Example(row, "x") for row in conversations(5)]
    batch = next(TurnRows(encode_turns(renderer, examples, 120), TurnRecipe(120, 600), 120).in_order())
    ours = batch_loss(loaded.model, batch, 0.0)
    ours.objective.backward()  # type: ignore[no-untyped-call]
    total = 0.0
    for example in examples:
        (ids, asked), _ = renderer.turns(example)
        labels = [one if own else -100 for one, own in zip(ids, asked, strict=True)]
        loss = theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss * sum(asked)
        loss.backward()
        total += float(loss.detach())
    assert float(ours.likelihood) == pytest.approx(total, rel=1e-5)
    assert loaded.family is not None
    gradients = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    found = loaded.family.names().to_disk(gradients)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


class TestRuns:
    def test_a_finished_run_is_complete(self, tuned: Path) -> None:
        check_manifest(tuned)
        scores = json.loads((tuned / "scores.json").read_text())
        assert scores["held_out"]["loss"] < scores["before"]["held_out"]["loss"]
        assert scores["drift"]["divergence"] > 0
        assert len(scores["samples"]) == 2
        report = (tuned / "report.md").read_text()
        assert "of them trained (Full)" in report
        assert "cut at the end to fit a row" in report
        assert "polyformer chat" in report
        assert [len((tuned / "samples" / f"epoch-000{i}.jsonl").read_text().splitlines()) for i in (1, 2)] == [2, 2]

    def test_the_reference_loads_it(self, tuned: Path) -> None:
        transformers = pytest.importorskip("transformers")
        theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(str(tuned)).eval(), load(tuned)
        ids = torch.tensor([ours.texts.encode("What does the house do?")])
        with torch.no_grad():
            torch.testing.assert_close(ours.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        assert len(ours.chat([[{"role": "user", "content": "What does the house do?"}]])) == 1

    def test_resumed_is_the_undisturbed_run(self, base: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
        recipe, folder = tune_recipe(base, data, OFTEN), tmp_path / "run"
        train_until(recipe, folder, 8)
        assert_same_run(tuned, train(recipe, folder, resume=True).folder)
        one, other = ((run / "samples" / "epoch-0002.jsonl").read_text() for run in (tuned, folder))
        assert one == other

    def test_another_base_is_refused(self, base: Path, data: Path, tmp_path: Path) -> None:
        other = decoder(tmp_path / "other", num_hidden_layers=1)
        recipe = tune_recipe(other, data, STEPS)
        train(recipe, tmp_path / "run")
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(RunError, match="holds another model than when this run began"):
            train(recipe, tmp_path / "run", resume=True)

    def test_another_recipe_is_refused(self, base: Path, data: Path, tuned: Path) -> None:
        other = tune_recipe(base, data, OFTEN, batch={"length": 64, "tokens": 128, "packing": "padded"})
        with pytest.raises(RunError, match=r"batch.packing is 'apart' there and 'padded' here"):
            train(other, tuned, resume=True)

    def test_frozen_layers_stay(self, base: Path, data: Path, tmp_path: Path) -> None:
        frozen = {"type": "Full", "frozen": ["target.*", "decoder.blocks.0.*", "head.*"]}
        folder = train(tune_recipe(base, data, STEPS, method=frozen), tmp_path / "run").folder
        before, after = load(base).model.state_dict(), load(folder).model.state_dict()
        moved = {name for name, tensor in before.items() if not tensor.equal(after[name])}
        assert moved
        assert all(name.startswith(("decoder.blocks.1.", "decoder.norm.")) for name in moved)
        held = load_file(next((folder / "checkpoints").iterdir()) / "model.safetensors")
        assert not any(name.startswith(("target.", "decoder.blocks.0.")) for name in held)

    def test_plain_texts(self, base: Path, tmp_path: Path) -> None:
        rows = [{"text": f"The house sees number {i}. " * 4} for i in range(30)]
        recipe = tune_recipe(base, write_jsonl(tmp_path / "texts.jsonl", rows), STEPS)
        report = (train(recipe, tmp_path / "run").folder / "report.md").read_text()
        assert "task: ReadTexts" in report
        assert "_written_" in report
        (tmp_path / "book.txt").write_text("The river falls.\n" * 300, encoding="utf-8")
        both = {"path": str(tmp_path / "book.txt"), "held_out": str(tmp_path / "texts.jsonl")}
        two = train(tune_recipe(base, tmp_path, STEPS, data=both), tmp_path / "two").folder
        told = (two / "splits" / "report.txt").read_text()
        assert "text: 1 to train on, 30 to validate with" in told

    def test_completions(self, base: Path, tmp_path: Path) -> None:
        rows = [{"prompt": f"The house {i}", "completion": f" reads {i}."} for i in range(30)]
        file = write_jsonl(tmp_path / "x.jsonl", rows)
        for prompts in ("plain", "chat"):
            recipe = tune_recipe(base, file, STEPS, task={"type": "Converse", "prompts": prompts})
            scores = json.loads((train(recipe, tmp_path / prompts).folder / "scores.json").read_text())
            assert ("<|im_start|>" in scores["samples"][0]["given"]) == (prompts == "chat")

    def test_it_learns(self, base: Path, data: Path, tmp_path: Path) -> None:
        recipe = tune_recipe(base, data, {"budget": {"type": "Steps", "count": 60}}, report={"samples": 0})
        scores = json.loads((train(recipe, tmp_path / "run").folder / "scores.json").read_text())
        assert scores["held_out"]["loss"] < 0.5 * scores["before"]["held_out"]["loss"]

    def test_a_gradient_that_is_no_number_stops_it(self, base: Path, data: Path, tmp_path: Path) -> None:
        recipe = tune_recipe(base, data, {**STEPS, "schedule": {"type": "Constant", "peak": 1e30}})
        with pytest.raises(RunError, match=r"is not finite at step 2 .*the last checkpoint is whole"):
            train(recipe, tmp_path / "run")


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"method": {"type": "Full", "frozen": ["decoder.bloks.*"]}}, r"'decoder.bloks..' matches no parameter"),
            ({"method": {"type": "Full", "frozen": ["*"]}}, "all parameters are frozen"),
            ({"batch": {"length": 5000}}, "batch.length is 5000, but .* reads at most 128 tokens"),
            ({"batch": {"length": 4}}, "all .* answers stand behind the 4 tokens"),
            ({"task": {"type": "ReadTexts"}}, "ReadTexts learns from examples of text, and .* holds messages"),
            ({"data": {"path": "none.jsonl"}}, "there is no file none.jsonl"),
            ({"data": {"path": "none"}}, "there is no file or folder none"),
            ({"base": "nowhere"}, "nowhere does not exist"),
        ],
    )
    def test_what_can_not_be_leaves_nothing_behind(
        self, changes: dict[str, Any], told: str, base: Path, data: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(PolyformerError, match=told):
            train(tune_recipe(base, data, STEPS, **changes), tmp_path / "run")
        assert not list(tmp_path.iterdir())


class TestCommand:
    def say(self, *arguments: str | Path, status: int = 0) -> str:
        result = runner.invoke(app, [str(one) for one in arguments])
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    def test_tune(self, base: Path, data: Path, tmp_path: Path) -> None:
        short = ["--set", "train.budget={type='Steps', count=3}", "--set", "train.precision=fp32"]
        short += ["--set", "report.sampling.limit=4", "--set", "batch.length=64"]
        out = tmp_path / "out"
        told = json.loads(self.say("tune", base, "--data", data, "--out", out, "--json", *short))
        assert told["scores"]["held_out"]["tokens"] > 0
        assert "Drift from the base" in (out / "report.md").read_text()
        assert "is a finished run" in self.say("tune", base, "--data", data, "--out", out, *short, status=1)
        assert "Answers to held-out" in self.say("tune", base, "--data", data, "--out", out, "--resume", *short)
        assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "share" in row][-1] == 3
        assert self.say("chat", out, "--help")
        assert self.say("generate", out, "The house", "--max-tokens", "2").startswith("The house")

    def test_what_is_wrong(self, base: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        told = self.say("tune", base, "--data", data, "--out", out, "--method", "ful", status=1)
        assert "no method 'ful' (did you mean 'full'?)" in told
        told = self.say("tune", base, "--data", data, "--out", out, "--set", "batch.lenth=3", status=1)
        assert "unknown key 'lenth'" in told
        told = self.say("tune", base, "--data", data, "--out", out, "--resume", status=1)
        assert "is no run folder to resume" in told
        assert not out.exists()


def test_evaluate_on_examples(base: Path, data: Path, tmp_path: Path) -> None:
    """The loss is that of the assistant's tokens, as tuning measures it."""
    result = runner.invoke(app, ["evaluate", str(base), "--data", str(data), "--limit", "5", "--json"])
    assert result.exit_code == 0, result.output
    loaded = load(base)
    examples = read_examples(data).rows[:5]
    rows = TurnRows(encode_turns(Renderer(loaded.texts, "chat"), examples, 128), TurnRecipe(128, 512), 128)
    assert json.loads(result.stdout)["held_out"]["loss"] == pytest.approx(
        held_out_loss(loaded.model, rows.in_order()).loss, rel=1e-5
    )
    labelled = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": i} for i in range(3)])
    result = runner.invoke(app, ["evaluate", str(base), "--data", str(labelled)])
    assert "gives no scores to the labels of" in result.stderr
