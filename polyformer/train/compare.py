"""Variants of one recipe, trained in turn on the same data with the same budget and seeds, and held side by side."""

from __future__ import annotations

import gc
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyformer.errors import RunError, SpecError
from polyformer.parts.model import Transformer, parameters_of
from polyformer.train.journal import Listener, Row, read_metrics
from polyformer.train.machine import peak_memory, reset_peak_memory
from polyformer.train.reading import read_recipe
from polyformer.train.recipe import Job
from polyformer.train.run import agreed, train

NOTES = "comparison.json"
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Quantiles of Student's t for a two-sided interval of 95 %, for 1, 2, … degrees of freedom; 2 for more."""


@dataclass(frozen=True)
class Variant:
    """One run: what is varied, as a person wrote it, its seed, and the recipe that this makes."""

    name: str
    seed: int
    recipe: Job

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        plain = re.sub(r"[^\w.+-]+", "-", self.name).strip("-")
        return f"{plain}-seed{self.seed}"


@dataclass(frozen=True)
class Measured:
    """What a finished run came to.

    Attributes:
        training_loss: the mean over the last tenth of training.
        held_out: nats a token on the test split.
        milliseconds: of a step, in the median.
        peak_mb: the most memory of the process while it trained, where the system tells; None for a run that was
            finished elsewhere.
    """

    name: str
    seed: int
    folder: str
    parameters: int
    steps: int
    tokens: int
    training_loss: float
    held_out: float
    bits_per_byte: float | None
    milliseconds: float
    tokens_per_second: float
    peak_mb: float | None


@dataclass(frozen=True)
class Comparison:
    """All runs; the first variant is the control. As text, a table."""

    runs: Sequence[Measured]
    curves: Sequence[Sequence[Row]]

    @property
    def names(self) -> list[str]:
        """The variants, the control first."""
        return list(dict.fromkeys(run.name for run in self.runs))

    def of(self, name: str) -> list[Measured]:
        """Return the runs of a variant, by seed."""
        return [run for run in self.runs if run.name == name]

    def spread(self, name: str) -> float | None:
        """Return the standard deviation of the held-out loss over seeds; None for a single one."""
        losses = [run.held_out for run in self.of(name)]
        return statistics.stdev(losses) if len(losses) > 1 else None

    def difference(self, name: str) -> tuple[float, float | None]:
        """Return by how much the held-out loss is above the control's, seed by seed, and half its 95 % interval."""
        pairs = zip(self.of(name), self.of(self.names[0]), strict=True)
        apart = [one.held_out - control.held_out for one, control in pairs]
        if len(apart) < 2:
            return apart[0], None
        quantile = T95[len(apart) - 2] if len(apart) - 2 < len(T95) else 2.0
        return statistics.mean(apart), quantile * statistics.stdev(apart) / len(apart) ** 0.5

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        told = []
        for name in self.names:
            apart, interval = self.difference(name)
            row = {"name": name, "held_out": statistics.mean(run.held_out for run in self.of(name))}
            told.append({**row, "spread": self.spread(name), "difference": apart, "interval_95": interval})
        return {"control": self.names[0], "variants": told, "runs": [asdict(run) for run in self.runs]}

    def __str__(self) -> str:
        head = (
            "variant",
            "parameters",
            "steps",
            "training",
            "held-out",
            "to control",
            "ms/step",
            "tokens/s",
            "peak MB",
        )
        rows = [head, *(self._row(name) for name in self.names)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join((row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))))
            for row in rows
        ]
        seeds = len(self.of(self.names[0]))
        note = f"losses in nats a token; {seeds} {'seed' if seeds == 1 else 'seeds'}; control: {self.names[0]}"
        return "\n".join([*lines, note])

    def _row(self, name: str) -> tuple[str, ...]:
        runs = self.of(name)
        apart, interval = self.difference(name)
        spread = self.spread(name)
        peaks = [run.peak_mb for run in runs if run.peak_mb is not None]
        return (
            name,
            f"{runs[0].parameters:,}",
            f"{statistics.mean(run.steps for run in runs):,.0f}",
            f"{statistics.mean(run.training_loss for run in runs):.3f}",
            f"{statistics.mean(run.held_out for run in runs):.3f}" + ("" if spread is None else f" ± {spread:.3f}"),
            f"{apart:+.3f}" + ("" if interval is None else f" ± {interval:.3f}"),
            f"{statistics.median(run.milliseconds for run in runs):.0f}",
            f"{statistics.median(run.tokens_per_second for run in runs):,.0f}",
            f"{max(peaks):,.0f}" if peaks else "–",
        )


def variants(path: Path, vary: Sequence[str], seeds: int, settings: Sequence[str] = ()) -> list[Variant]:
    """Return the runs of a recipe for all combinations of what is varied, each with several seeds.

    Args:
        vary: `key=a,b,c`; commas within brackets and quotes belong to a value.
        settings: what is set in all of them.
    Raises:
        SpecError: a value that can't be, two variants that are the same.
    """
    choices = []
    for one in vary:
        key, equals, text = one.partition("=")
        values = split_values(text)
        if not equals or not all(values):
            raise SpecError(f"--vary wants key=a,b,…, such as model.attention=softmax,performer, not '{one}'")
        choices.append([(key.strip(), value) for value in values])
    found = []
    for chosen in itertools.product(*choices):
        name = ", ".join(value for _, value in chosen)
        own = [*settings, *(f"{key}={value}" for key, value in chosen)]
        first = read_recipe(path, own)
        for seed in range(first.train.seed, first.train.seed + seeds):
            found.append(Variant(name, seed, read_recipe(path, [*own, f"train.seed={seed}"])))
    folders = [one.folder for one in found]
    twice = next((one for one in folders if folders.count(one) > 1), None)
    if twice is not None:
        raise SpecError(f"two variants would be in one folder, {twice}; name each value of --vary once")
    return found


def split_values(text: str) -> list[str]:
    """Split at commas that are outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += 0 if quote else (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def compare(runs: Sequence[Variant], out: Path, listeners: tuple[Listener, ...] = ()) -> Comparison | None:
    """Train what is not trained yet, one run after the other, and measure all; None if that was interrupted.

    Raises:
        RunError: a run folder in `out` was made with another recipe; the errors of `train`.
    """
    notes = _notes(out)
    found, curves = [], []
    for one in runs:
        folder = out / one.folder
        if not _finished(one.recipe, folder):
            gc.collect()
            reset_peak_memory()
            resume = (folder / "recipe.toml").exists()
            if not train(one.recipe, folder, resume, listeners=listeners).finished:
                return None
            notes[one.folder] = peak_memory()
            (out / NOTES).write_text(json.dumps({"peak_bytes": notes}, indent=1) + "\n", encoding="utf-8")
        rows = read_metrics(folder / "metrics.jsonl")
        found.append(_measured(one, folder, rows, notes.get(one.folder)))
        curves.append(rows)
    return Comparison(found, curves)


def _notes(out: Path) -> dict[str, int | None]:
    if not (out / NOTES).exists():
        return {}
    read: dict[str, int | None] = json.loads((out / NOTES).read_text(encoding="utf-8"))["peak_bytes"]
    return read


def _finished(recipe: Job, folder: Path) -> bool:
    """Tell whether a run of this very recipe is finished; raises `RunError` if one of another recipe stands there."""
    if not (folder / "recipe.toml").exists():
        return False
    wanted = agreed(recipe, folder)
    same = wanted == Job.from_toml((folder / "recipe.toml").read_text(encoding="utf-8"))
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return same and "report.md" in listed and "metrics.jsonl" in listed


def _measured(one: Variant, folder: Path, rows: Sequence[Row], peak: int | None) -> Measured:
    steps = [row for row in rows if "loss" in row]
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    spec = Transformer.from_json((folder / "spec.json").read_text(encoding="utf-8"))
    last = steps[-max(1, len(steps) // 10) :]
    rates, times = [], []
    for before, row in zip([{"tokens": 0, "step": 0}, *steps], steps, strict=False):
        rates.append(row["tokens_per_second"])
        seconds = (row["tokens"] - before["tokens"]) / max(row["tokens_per_second"], 1e-9)
        times.append(1000 * seconds / (row["step"] - before["step"]))
    return Measured(
        name=one.name,
        seed=one.seed,
        folder=str(folder),
        parameters=parameters_of(spec.build("meta")),
        steps=steps[-1]["step"],
        tokens=steps[-1]["tokens"],
        training_loss=statistics.mean(row["loss"] for row in last),
        held_out=scores["held_out"]["loss"],
        bits_per_byte=scores.get("bits_per_byte"),
        milliseconds=statistics.median(times),
        tokens_per_second=statistics.median(rates),
        peak_mb=None if peak is None else peak / 1e6,
    )


def draw(found: Comparison, file: Path) -> None:
    """Draw the training losses, thin, and the validation losses, over steps and over time.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("drawing needs matplotlib: pip install 'polyformer[plot]'") from None
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(found.names):
        curves = [rows for run, rows in zip(found.runs, found.curves, strict=True) if run.name == name]
        for i, rows in enumerate(curves):
            _draw_run(over_steps, over_time, rows, f"C{number}", name if i == 0 else None)
    over_steps.set(xlabel="step", ylabel="negative log-likelihood (nats a token)", title="Loss over steps")
    over_time.set(xlabel="seconds of training", title="Loss over time")
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
    over_time.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_run(over_steps: Any, over_time: Any, rows: Sequence[Row], color: str, label: str | None) -> None:
    trained = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "validation_loss" in row]
    seconds = {row["step"]: row["seconds"] for row in trained}
    for axes, places in ((over_steps, {step: step for step in seconds}), (over_time, seconds)):
        axes.plot([places[r["step"]] for r in trained], [r["loss"] for r in trained], lw=1, alpha=0.4, color=color)
        known = [row for row in held_out if row["step"] in places]
        axes.plot(
            [places[r["step"]] for r in known], [r["validation_loss"] for r in known], "o-", color=color, label=label
        )
