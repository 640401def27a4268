"""Comparisons: which runs there are, that finished ones are left alone, the table and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyformer.cli import app
from polyformer.errors import RunError, SpecError
from polyformer.train.compare import Comparison, Measured, compare, split_values, variants
from tests.train.toy_texts import text_recipe, write_texts


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    made = text_recipe(write_texts(folder / "texts"), {"budget": {"type": "Steps", "count": 4}, "log_every": 2})
    (folder / "recipe.toml").write_text(made.to_toml())
    return folder / "recipe.toml"


def test_values_are_split_at_outer_commas() -> None:
    assert split_values("a, b,{x = [1, 2], y = 'q,r'}") == ["a", "b", "{x = [1, 2], y = 'q,r'}"]


def test_variants(recipe: Path) -> None:
    vary = ["model.attention=softmax,{type='Window', width=4}", "model.depth=1,2"]
    found = variants(recipe, vary, 2, ["model.width=64"])
    assert len(found) == 8
    assert found[0].folder == "softmax-1-seed0"
    assert found[-1].folder == "type-Window-width-4-2-seed1"
    assert found[-1].recipe.train.seed == 1
    assert found[-1].recipe.model.width == 64  # type: ignore[attr-defined]
    for wrong in (["model.depth"], ["model.depth=1,"]):
        with pytest.raises(SpecError, match="--vary wants key=a,b"):
            variants(recipe, wrong, 1)
    with pytest.raises(SpecError, match="two variants would be in one folder"):
        variants(recipe, ["model.depth=1,1"], 1)
    with pytest.raises(SpecError, match="did you mean 'depth'"):
        variants(recipe, ["model.dept=1,2"], 1)


def test_from_the_command_line(recipe: Path, tmp_path: Path) -> None:
    """Two attentions; the second time nothing is trained, and another recipe's runs are refused."""
    out, plot = tmp_path / "runs", tmp_path / "plot.png"
    asked = ["compare", str(recipe), "--vary", "model.attention=softmax,linear", "--out", str(out)]
    first = CliRunner().invoke(app, [*asked, "--plot", str(plot)])
    assert first.exit_code == 0, first.output
    assert "control: softmax" in first.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    models = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert len(models) == 2
    again = CliRunner().invoke(app, [*asked, "--json"])
    assert {path: path.stat().st_mtime_ns for path in models} == models
    told = json.loads(again.stdout)
    assert [one["name"] for one in told["variants"]] == ["softmax", "linear"]
    assert told["variants"][0]["difference"] == 0.0
    assert told["runs"][1]["steps"] == 4
    assert told["runs"][0]["parameters"] == told["runs"][1]["parameters"]
    over = CliRunner().invoke(app, [*asked, "--plot", str(plot)])
    assert "--force" in over.stderr
    other = CliRunner().invoke(app, [*asked, "--set", "model.depth=1"])
    assert other.exit_code == 1
    assert "model.depth is 2 there and 1 here" in other.stderr


def test_an_unfinished_run_is_gone_on_with(recipe: Path, tmp_path: Path) -> None:
    runs = variants(recipe, ["model.attention=softmax,none"], 1)

    class StopError(Exception):
        pass

    class Stop:
        def hear(self, row: dict[str, object]) -> None:
            raise StopError

    with pytest.raises(StopError):
        compare(runs, tmp_path, (Stop(),))
    found = compare(runs, tmp_path)
    assert found is not None
    assert [run.steps for run in found.runs] == [4, 4]
    (tmp_path / "softmax-seed0" / "recipe.toml").write_text("type = 'TextRecipe'\nname = 'x'\ndata.corpora = []")
    with pytest.raises((RunError, SpecError)):
        compare(runs, tmp_path)


def test_spread_and_differences() -> None:
    def run(name: str, seed: int, loss: float) -> Measured:
        return Measured(name, seed, "", 10, 4, 100, 3.0, loss, None, 5.0, 20.0, None)

    losses = {"a": (2.0, 2.2, 2.4), "b": (2.1, 2.4, 2.6)}
    found = Comparison([run(n, i, loss) for n, all_ in losses.items() for i, loss in enumerate(all_)], [])
    assert found.spread("a") == pytest.approx(0.2)
    mean, interval = found.difference("b")
    assert mean == pytest.approx(0.5 / 3)
    assert interval == pytest.approx(4.30 * 0.0577350 / 3**0.5, rel=1e-4)
    assert "2.200 ± 0.200" in str(found)
    assert "+0.167 ± 0.143" in str(found)
