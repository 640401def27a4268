"""Language models from a recipe to a run folder: both objectives, resuming bit for bit, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from polyformer import load
from polyformer.cli import app
from polyformer.errors import DataError, RunError, SpecError
from polyformer.train.journal import read_metrics
from polyformer.train.reading import read_recipe
from polyformer.train.recipe import Job, TextRecipe
from polyformer.train.run import reopen, train
from polyformer.train.schedules import Steps
from polyformer.weights.folders import check_manifest
from tests.train.test_run import TIMES
from tests.train.toy import recipe as pair_recipe
from tests.train.toy_texts import text_recipe, write_texts

MASKED: dict[str, object] = {"objective": {"type": "MaskedTokens"}, "tokenizer": {"vocabulary": 300}}
OFTEN = {"checkpoint_minutes": 0.0}

runner = CliRunner()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def causal(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(text_recipe(texts, OFTEN), tmp_path_factory.mktemp("causal") / "run").folder


@pytest.fixture(scope="module")
def masked(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(text_recipe(texts, OFTEN, **MASKED), tmp_path_factory.mktemp("masked") / "run").folder


def say(*arguments: str | Path, status: int = 0) -> str:
    result = runner.invoke(app, [str(one) for one in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def assert_same_run(one: Path, other: Path) -> None:
    """Weights bit for bit, metrics to the last digit, the same scores."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(tensor.equal(b[name]) for name, tensor in a.items())
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (one, other)]
    assert [{**each, "seconds": 0} for each in scores[:1]] == [{**each, "seconds": 0} for each in scores[1:]]


class TestRuns:
    def test_a_finished_run_is_complete(self, causal: Path) -> None:
        check_manifest(causal)
        scores = json.loads((causal / "scores.json").read_text())
        assert scores["held_out"]["tokens"] > 100
        assert 0 < scores["bits_per_byte"] < 8
        report = (causal / "report.md").read_text()
        assert "bits per byte" in report
        assert "_written_" in report
        assert "polyformer generate" in report
        assert (causal / "figures" / "loss.png").exists()

    def test_a_masked_run_is_complete(self, masked: Path) -> None:
        check_manifest(masked)
        assert "bits_per_byte" not in json.loads((masked / "scores.json").read_text())
        report = (masked / "report.md").read_text()
        assert "_with masks_" in report
        assert "<mask>" in report
        assert "polyformer fill" in report

    def test_the_recipe_says_all_sizes(self, causal: Path) -> None:
        recipe = Job.from_toml((causal / "recipe.toml").read_text())
        assert isinstance(recipe, TextRecipe)
        assert (recipe.model.vocabulary, recipe.model.length, recipe.model.reads) == (300, 32, "forwards")

    def test_two_runs_are_equal(self, texts: Path, causal: Path, tmp_path: Path) -> None:
        assert_same_run(causal, train(text_recipe(texts, OFTEN), tmp_path / "run").folder)
        other = train(text_recipe(texts, {**OFTEN, "seed": 1}), tmp_path / "other").folder
        with pytest.raises(AssertionError):
            assert_same_run(causal, other)

    @pytest.mark.parametrize("kind", ["causal", "masked"])
    def test_resumed_is_the_undisturbed_run(
        self, kind: str, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        recipe = text_recipe(texts, OFTEN, **(MASKED if kind == "masked" else {}))
        folder = tmp_path / "run"
        train_until(recipe, folder, 8)
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
        assert_same_run(request.getfixturevalue(kind), train(recipe, folder, resume=True).folder)

    def test_a_larger_budget(self, texts: Path, tmp_path: Path) -> None:
        recipe = text_recipe(texts, OFTEN)
        folder = train(recipe, tmp_path / "run").folder
        train(recipe.replace(train=recipe.train.replace(budget=Steps(16))), folder, resume=True)
        check_manifest(folder)
        assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 16

    def test_apart_and_accumulated(self, texts: Path, tmp_path: Path) -> None:
        batch = {"length": 32, "tokens": 64, "documents": "apart"}
        train(
            text_recipe(texts, {"accumulate": 2, "budget": {"type": "Steps", "count": 2}}, batch=batch), tmp_path / "r"
        )
        assert "documents apart" in (tmp_path / "r" / "report.md").read_text()

    @pytest.mark.slow
    def test_it_learns(self, texts: Path, tmp_path: Path) -> None:
        steps = {"budget": {"type": "Steps", "count": 250}, "evaluations": 5}
        folder = train(text_recipe(texts, steps), tmp_path / "run").folder
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["validation_loss"] for row in rows if "validation_loss" in row][-1] < rows[0]["loss"] / 3


def train_until(recipe: Job, folder: Path, steps: int) -> None:
    """Train, and stop as a kill would after so many steps."""

    class CutError(Exception):
        pass

    class Stop:
        def hear(self, row: dict[str, Any]) -> None:
            if row["step"] >= steps:
                raise CutError

    with pytest.raises(CutError):
        train(recipe, folder, listeners=(Stop(),))


@pytest.mark.slow
def test_killed_and_resumed_is_the_undisturbed_run(texts: Path, tmp_path: Path) -> None:
    """kill -9 as soon as a checkpoint is there, again and again."""
    recipe = text_recipe(texts, {**OFTEN, "budget": {"type": "Steps", "count": 60}}, **MASKED)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "polyformer", "train", str(file), "--out", str(folder), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    def saved(folder: Path) -> int:
        return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)

    straight = start(tmp_path / "straight")
    _, err = straight.communicate()
    assert straight.returncode == 0, err.decode()
    folder, kills = tmp_path / "killed", 0
    while True:
        process = start(folder, *(["--resume"] if (folder / "recipe.toml").exists() else []))
        before = saved(folder)
        while saved(folder) <= before + 7 and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            _, err = process.communicate()
            assert process.returncode == 0, err.decode()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 3
    assert_same_run(tmp_path / "straight", folder)


class TestUse:
    def test_generate_evaluate_and_inspect(self, causal: Path) -> None:
        assert say("generate", causal, "The house", "--max-tokens", "3").startswith("The house")
        told = json.loads(say("evaluate", causal, "--json"))
        own = json.loads((causal / "scores.json").read_text())
        assert told["held_out"] == pytest.approx(own["held_out"], rel=1e-5)
        assert told["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-5)
        assert "Attention" in say("inspect", causal)

    def test_evaluate_on_other_texts(self, causal: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("The house sees the river.\n")
        assert "bits per byte" in say("evaluate", causal, "--data", tmp_path / "a.txt")
        assert "translation models" in say("evaluate", causal, "--beam", "2", status=1)
        assert "no file or folder" in say("evaluate", causal, "--data", tmp_path / "none.txt", status=1)

    def test_fill(self, masked: Path) -> None:
        assert len(say("fill", masked, "The <mask> sees", "--top", "2").splitlines()) == 2
        assert "perplexity" in say("evaluate", masked)
        assert "writing a text needs a decoder" in say("generate", masked, "The", status=1)

    def test_python(self, causal: Path) -> None:
        loaded = load(causal)
        assert loaded.texts.eos_id == 2
        assert len(loaded.generate(["The", "A house"])) == 2


class TestRecipes:
    def test_the_type_says_which(self, tmp_path: Path) -> None:
        file = tmp_path / "r.toml"
        file.write_text('type = "TextRecipe"\nname = "r"\n[data]\ncorpora = [{type = "TextFiles", paths = ["a"]}]\n')
        assert isinstance(read_recipe(file), TextRecipe)
        read = read_recipe(file, ["model.attention=performer"])
        assert isinstance(read, TextRecipe)
        assert read.model.attention == "performer"
        with pytest.raises(SpecError, match=r"unknown key 'modle'.*did you mean 'model'"):
            read_recipe(file, ["modle.width=3"])
        with pytest.raises(SpecError, match=r"no Job of type 'TextRecip'.*did you mean 'TextRecipe'"):
            read_recipe(file, ["type=TextRecip"])
        with pytest.raises(SpecError, match="MaskedTokens needs a model that reads both ways"):
            read_recipe(file, ['objective={type="MaskedTokens"}', "model.reads=forwards"])
        with pytest.raises(SpecError, match="rows of 256 tokens, but the model has 8"):
            read_recipe(file, ["model.length=8"])

    def test_all_recipes_can_be_read(self) -> None:
        for file in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")):
            assert read_recipe(file).name == file.stem

    def test_runs_of_another_kind(self, texts: Path, causal: Path, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="was started with a TextRecipe, and this is a Recipe"):
            reopen(pair_recipe(tmp_path / "none.tsv"), causal)
        other = text_recipe(texts, OFTEN, model={"width": 32, "depth": 3, "heads": 2, "feedforward": {"hidden": 64}})
        with pytest.raises(RunError, match=r"model\.depth is 2 there and 3 here"):
            reopen(other, causal)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model": {"attention": "linformer"}}, "Linformer can't follow .*can't honour the rule Causal"),
            ({"model": {"attention": "perfomer"}}, "no attention 'perfomer' .did you mean 'performer'"),
            ({"model": {"attention": "capped"}}, "'capped' needs values that only you can choose"),
            ({"model": {"attention": "performer", "positions": "alibi"}}, "makes no scores that a position"),
            ({"model": {"attention": "retention"}, **MASKED}, "Retention: is causal"),
            ({"tokenizer": {"vocabulary": 20_000}}, "20,000 tokens is more than the training texts can give"),
            ({"batch": {"length": 5000, "tokens": 5000}}, "too few for a row of 5000"),
            (
                {"model": {"attention": "linformer"}, "batch": {"length": 32, "documents": "apart"}, **MASKED},
                "nothing can keep documents apart",
            ),
        ],
    )
    def test_what_can_not_be_leaves_nothing_behind(
        self, changes: dict[str, Any], sentence: str, texts: Path, tmp_path: Path
    ) -> None:
        with pytest.raises((SpecError, DataError), match=sentence):
            train(text_recipe(texts, **changes), tmp_path / "run")
        assert not list(tmp_path.iterdir())
