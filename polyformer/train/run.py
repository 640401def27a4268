"""From a recipe to a run folder: prepare the data once, train, judge, and leave a record that a person can read.

A run folder holds `recipe.toml` (resolved), `spec.json`, `tokenizer/`, `splits/`, `metrics.jsonl` and `checkpoints/`
from the start; and when training has ended `model.safetensors`, `figures/`, `scores.json` and `report.md`. Its
`manifest.json`, with the SHA-256 of every file but the checkpoints, is written when the folder is made and once more
at the very end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from polyformer.errors import RunError
from polyformer.spec import Record, field_types
from polyformer.train.checkpoints import Training, restore_checkpoint
from polyformer.train.figures import draw_figures
from polyformer.train.jobs import Opened, Work
from polyformer.train.journal import Journal, Listener, TensorBoard, read_metrics
from polyformer.train.loop import Company, candidate, run, using
from polyformer.train.machine import best_device, fastest_precision
from polyformer.train.recipe import Job, TrainRecipe
from polyformer.train.report import Told, write_report
from polyformer.train.works import work_of
from polyformer.weights.folders import recover, staged_folder, unsaved, write_manifest

J = TypeVar("J", bound=Job)

PASSING = ("checkpoints", "tensorboard")  # not what a finished run consists of


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: where the run lies, and whether it is finished or was interrupted."""

    folder: Path
    finished: bool


def train(
    recipe: Job, out: Path, resume: bool = False, force: bool = False, listeners: tuple[Listener, ...] = ()
) -> Outcome:
    """Train the model of a recipe into the run folder `out`.

    Args:
        resume: go on with the run in `out` from its newest checkpoint; its recipe must be this one (a larger budget
            is welcome).
        force: replace a run that stands in `out`.
        listeners: hear each row of metrics as it is written.
    Raises:
        RunError, DataError, SpecError, WeightsError: each with one sentence.
    """
    recover(out)
    recipe = reopen(recipe, out) if resume else create(recipe, out, force)
    if recipe.train.tensorboard:
        listeners = (*listeners, TensorBoard(out / "tensorboard"))
    work = work_of(recipe)
    training, company, opened = _open(work, out, listeners)
    try:
        ending = run(training, recipe.train, company)
    finally:
        company.journal.close()
    if ending != "interrupted":
        _finish(work, out, training, opened)
    return Outcome(out, ending != "interrupted")


def create(recipe: J, out: Path, force: bool = False) -> J:
    """Prepare the data, train the tokenizer, and make a run folder that is ready to train; return what it says.

    Everything that training reads lies in the folder afterwards: resuming does not ask for the corpora again.
    """
    if out.exists() and any(out.iterdir()) and not force:
        state = "is a finished run" if (out / "scores.json").exists() else "holds an unfinished run"
        raise RunError(f"{out} {state}; go on with --resume, replace it with --force, or choose another --out")
    with staged_folder(out, replace=force) as stage:
        prepared: J = work_of(recipe).prepare(stage)
        recipe = prepared.replace(train=settle(prepared.train))
        (stage / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        work_of(recipe).begin(stage)
    return recipe


def settle(recipe: TrainRecipe) -> TrainRecipe:
    """Return the recipe with what was left to this machine decided."""
    device = best_device() if recipe.device == "auto" else recipe.device
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("train.device is 'cuda', but PyTorch finds no GPU here; leave it out, or set train.device=cpu")
    precision = fastest_precision(device) if recipe.precision == "auto" else recipe.precision
    return recipe.replace(device=device, precision=precision)


def _open(work: Work[Any], out: Path, listeners: tuple[Listener, ...]) -> tuple[Training, Company, Opened]:
    """Build the model and the readers, and go back to the newest checkpoint if there is one."""
    recipe: Job = work.recipe
    opened = work.open(out)
    torch.manual_seed(recipe.train.seed)
    model = work.model().to(recipe.train.device)
    average = None if recipe.train.average is None else recipe.train.average.start()
    training = Training(model, recipe.train.optimiser.build(model), opened.train, average)
    restore_checkpoint(out / "checkpoints", training)
    journal = Journal(out / "metrics.jsonl", training.state.metrics_bytes, listeners)
    company = Company(out / "checkpoints", journal, opened.validation, opened.aim, opened.after_epoch)
    return training, company, opened


def _finish(work: Work[Any], out: Path, training: Training, opened: Opened) -> None:
    """Put the weights that are kept into the model, judge them, and complete the folder; the manifest comes last."""
    recipe: Job = work.recipe
    kept = training.best if recipe.train.patience and training.best else candidate(training)
    model = training.model
    with using(model, kept):
        model.eval()
        work.keep(model, out)
        rows = read_metrics(out / "metrics.jsonl")
        draw_figures(rows, out / "figures")
        scores = opened.judge(model)
    with _saving(out):
        (out / "scores.json").write_text(json.dumps(scores.to_data(), indent=1, ensure_ascii=False), encoding="utf-8")
        write_report(out, recipe, rows, Told(work.what, work.about, work.told(scores), work.commands), model)
        write_manifest(out, PASSING)


@contextmanager
def _saving(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unsaved(out, error) from error


def reopen(asked: J, out: Path) -> J:
    """Return the recipe of the run in `out`, with the budget now asked for, and make the folder ready to go on.

    Raises:
        RunError: as `agreed` does.
    """
    recipe = agreed(asked, out)
    with _saving(out):
        text = recipe.to_toml()
        if text != (out / "recipe.toml").read_text(encoding="utf-8"):
            beside = out / ".recipe.toml"
            beside.write_text(text, encoding="utf-8")
            beside.replace(out / "recipe.toml")
        write_manifest(out, (*PASSING, "metrics.jsonl"))  # a finished run's metrics are about to grow
    return recipe


def agreed(asked: J, out: Path) -> J:
    """Return the recipe of the run in `out`, with the budget now asked for; nothing is changed.

    Raises:
        RunError: there is no run in `out`, or it was started with another recipe; names the first difference.
    """
    try:
        text = (out / "recipe.toml").read_text(encoding="utf-8")
    except OSError:
        raise RunError(f"{out} is no run folder to resume; leave --resume out to start one there") from None
    own = Job.from_toml(text, str(out / "recipe.toml"))
    if type(own) is not type(asked):
        raise RunError(f"{out} was started with a {type(own).__name__}, and this is a {type(asked).__name__}")
    automatic = [name for name in ("precision", "device") if getattr(asked.train, name) == "auto"]
    machine = {name: getattr(own.train, name) for name in automatic}
    settled: J = work_of(asked).like(own)
    settled = settled.replace(train=asked.train.replace(budget=own.train.budget, **machine))
    if settled != own:
        raise RunError(
            f"{out} was started with another recipe ({_difference(own, settled)}); only the budget may change"
        )
    return own.replace(train=own.train.replace(budget=asked.train.budget))


def _difference(one: Record, other: Record, path: str = "") -> str:
    """Name the first field in which two records differ."""
    for name in field_types(type(one)):
        a, b = getattr(one, name), getattr(other, name)
        inner = f"{path}{name}"
        if isinstance(a, Record) and type(a) is type(b) and a != b:
            return _difference(a, b, f"{inner}.")
        if a != b:
            return f"{inner} is {_shown(a)} there and {_shown(b)} here"
    return path


def _shown(value: object) -> str:
    return str(value.to_data()) if isinstance(value, Record) else repr(value)
