"""Run folders: what they hold, that a kill at any moment loses nothing, and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from polyformer.errors import PolyformerError, RunError
from polyformer.train.journal import read_metrics
from polyformer.train.recipe import Recipe
from polyformer.train.run import create, reopen, train
from polyformer.train.schedules import Steps
from polyformer.weights.folders import check_manifest
from tests.train.toy import recipe as toy_recipe
from tests.train.toy import write_corpus

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return toy_recipe(write_corpus(tmp_path_factory.mktemp("corpus") / "toy.tsv"), checkpoint_minutes=0.0)


@pytest.fixture(scope="module")
def undisturbed(toy: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy, tmp_path_factory.mktemp("undisturbed") / "run").folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows without what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights bit for bit, metrics to the last digit, the same scores and splits."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(tensor.equal(b[name]) for name, tensor in a.items())
    assert metrics(one) == metrics(other)
    scores = [json.loads((folder / "scores.json").read_text())["directions"] for folder in (one, other)]
    assert scores[0] == scores[1]
    for name in ("train", "validation", "test"):
        path = f"splits/{name}.jsonl"
        assert (one / path).read_bytes() == (other / path).read_bytes()


def test_a_finished_run_is_complete_and_whole(undisturbed: Path) -> None:
    check_manifest(undisturbed)
    listed = set(json.loads((undisturbed / "manifest.json").read_text())["files"])
    wanted = {"recipe.toml", "spec.json", "metrics.jsonl", "model.safetensors", "report.md", "scores.json"}
    assert wanted <= listed
    assert {"figures/loss.png", "figures/learning_rate.png", "tokenizer/tokenizer.json"} <= listed
    report = (undisturbed / "report.md").read_text()
    assert "BLEU" in report
    assert "the " in report


def test_two_runs_of_one_recipe_are_equal(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    assert_same_run(undisturbed, train(toy, tmp_path / "run").folder)


def test_another_seed_is_another_run(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """The comparison above can fail."""
    other = train(toy.replace(train=toy.train.replace(seed=1)), tmp_path / "run").folder
    with pytest.raises(AssertionError):
        assert_same_run(undisturbed, other)


def start(folder: Path, recipe: Path, *options: str, threads: int = 2) -> subprocess.Popen[bytes]:
    """Train in a process of its own; equal runs have equally many threads (one, in the tests' own process)."""
    command = [sys.executable, "-m", "polyformer", "train", str(recipe), "--out", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def steps_saved(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_is_the_undisturbed_run(toy: Recipe, tmp_path: Path) -> None:
    """kill -9, again and again, at moments drawn at random; with a checkpoint after every step."""
    long = toy.replace(train=toy.train.replace(budget=Steps(150)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(long.to_toml())
    straight = start(tmp_path / "straight", recipe)
    _, err = straight.communicate()
    assert straight.returncode == 0, err.decode()

    folder, draw, kills = tmp_path / "killed", random.Random(0), []
    while True:
        process = start(folder, recipe, *(["--resume"] if (folder / "recipe.toml").exists() else []))
        before = steps_saved(folder)
        until = time.monotonic() + 60
        while steps_saved(folder) <= before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.0))
        if process.poll() is not None:
            _out, err = process.communicate()
            assert process.returncode == 0, err.decode()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills.append(steps_saved(folder))
        assert len(kills) < 60
    assert len(kills) >= 3, kills
    assert_same_run(tmp_path / "straight", folder)
    assert not [path for path in folder.rglob("*.unfinished") if path.is_dir()]


@pytest.mark.slow
def test_an_interrupt_saves_and_says_how_to_go_on(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(toy.to_toml())
    folder = tmp_path / "run"
    process = start(folder, recipe, threads=1)
    while not steps_saved(folder) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert "--resume" in err.decode()
    assert "Traceback" not in err.decode()
    assert_same_run(undisturbed, train(toy, folder, resume=True).folder)


def test_resumed_from_every_checkpoint_left_is_the_undisturbed_run(
    toy: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """What the slow tests show by killing, without processes: cut a run back to a checkpoint, with later rubbish."""
    folder = tmp_path / "run"
    short = toy.replace(train=toy.train.replace(budget=Steps(24)))
    create(short, folder)
    stopped = short.replace(train=short.train.replace(budget=Steps(24)))
    _train_until(stopped, folder, 13)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 14, "loss": 1.0}\n{"step": 15, "lo')
    assert_same_run(undisturbed, train(toy, folder, resume=True).folder)
    check_manifest(folder)


def _train_until(recipe: Recipe, folder: Path, steps: int) -> None:
    """Train as `train` does, and stop as a kill would after so many steps."""

    class CutError(Exception):
        pass

    class Stop:
        def hear(self, row: dict[str, Any]) -> None:
            if row["step"] >= steps:
                raise CutError

    with pytest.raises(CutError):
        train(recipe, folder, resume=True, listeners=(Stop(),))


def test_a_finished_run_can_be_given_a_larger_budget(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    longer = toy.replace(train=toy.train.replace(budget=Steps(30)))
    train(longer, folder, resume=True)
    check_manifest(folder)
    assert metrics(folder)[-1]["step"] == 30
    assert "count = 30" in (folder / "recipe.toml").read_text()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    create(toy, folder)
    _train_until(toy, folder, 12)
    newest = sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors"
    flipped = bytearray(newest.read_bytes())
    flipped[-1] ^= 1
    newest.write_bytes(flipped)
    assert_same_run(undisturbed, train(toy, folder, resume=True).folder)


def test_if_no_checkpoint_is_whole_it_says_so(toy: Recipe, tmp_path: Path) -> None:
    create(toy, tmp_path / "run")
    _train_until(toy, tmp_path / "run", 8)
    for path in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole: .*model.safetensors"):
        train(toy, tmp_path / "run", resume=True)


def test_a_run_is_not_overwritten_unasked(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"finished run.*--force"):
        train(toy, undisturbed)
    create(toy, tmp_path / "half")
    with pytest.raises(RunError, match=r"unfinished run.*--resume"):
        train(toy, tmp_path / "half")
    train(toy, tmp_path / "half", force=True)
    check_manifest(tmp_path / "half")


def test_resume_wants_a_run_of_this_recipe(toy: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder to resume"):
        train(toy, tmp_path / "nothing", resume=True)
    other = toy.replace(train=toy.train.replace(smoothing=0.2))
    with pytest.raises(RunError, match=r"train.smoothing is 0.1 there and 0.2 here"):
        reopen(other, undisturbed)
    deeper = toy.replace(model=toy.model.replace(width=64))
    with pytest.raises(RunError, match=r"model.width is 32 there and 64 here"):
        reopen(deeper, undisturbed)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    toy: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    create(toy, folder)
    from polyformer.train import checkpoints

    write, calls = checkpoints.write_tensors, []

    def full(path: Path, tensors: Any) -> None:
        calls.append(path)
        if len(calls) > 22:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(PolyformerError, match="No space left on device; free some space"):
        train(toy, folder, resume=True)
    monkeypatch.undo()
    assert len(list((folder / "checkpoints").iterdir())) == 2, "the unfinished checkpoint is gone"
    assert_same_run(undisturbed, train(toy, folder, resume=True).folder)


def test_too_few_positions_are_refused_before_anything_is_read(toy: Recipe) -> None:
    positions = toy.model.positions.replace(kind="learned", length=4)
    with pytest.raises(PolyformerError, match=r"128 tokens, but the model has 4 positions"):
        toy.replace(model=toy.model.replace(positions=positions))


def test_a_failing_start_leaves_nothing_behind(toy: Recipe, tmp_path: Path) -> None:
    hungry = toy.replace(tokenizer=toy.tokenizer.replace(vocabulary=20_000))
    with pytest.raises(PolyformerError, match="20,000"):
        train(hungry, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_figures_are_not_needed(toy: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib a run has no figures, and is complete."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = train(toy.replace(train=toy.train.replace(budget=Steps(4))), tmp_path / "run").folder
    assert not (folder / "figures").exists()
    assert "Figures" not in (folder / "report.md").read_text()
    check_manifest(folder)
