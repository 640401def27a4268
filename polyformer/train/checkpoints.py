"""Everything that changes while a model trains, and its way to disk and back.

A checkpoint is a folder that is written beside, made durable and renamed into place, so that a kill at any moment
leaves the earlier ones whole. It holds all that the next step depends on: a resumed run is the undisturbed one, bit
for bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyformer.data.reader import Reader
from polyformer.errors import RunError, WeightsError
from polyformer.parts.model import TransformerPart
from polyformer.train.averages import Running, Weights, weights_of
from polyformer.train.optimisers import optimiser_tensors, restore_optimiser
from polyformer.train.schedules import Spent
from polyformer.weights.files import read_tensors, write_tensors
from polyformer.weights.folders import check_manifest, staged_folder

KEPT = 2


@dataclass
class State:
    """The numbers of a run.

    Attributes:
        steps, tokens, seconds: optimiser steps, target tokens and wall time of training so far.
        evaluations, best, worse: evaluations done, the best validation loss, and how many since then were worse.
        skipped: steps left out for a gradient that was not finite.
        metrics_bytes: length of `metrics.jsonl`.
        rate: the learning rate of the last step.
        window: sums since the last row of metrics: objective, likelihood, tokens, seconds.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    best: float | None = None
    worse: int = 0
    skipped: int = 0
    metrics_bytes: int = 0
    rate: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])


@dataclass
class Training:
    """A run in progress. `best` holds the best weights where early stopping may go back to them."""

    model: TransformerPart
    optimiser: torch.optim.Optimizer
    batches: Reader[Any]
    average: Running | None = None
    state: State = field(default_factory=State)
    best: Weights = field(default_factory=dict)

    @property
    def epochs(self) -> float:
        """Passes over the training data so far."""
        return self.batches.epoch + self.batches.index / len(self.batches)

    def spent(self) -> Spent:
        """Return what counts against the budget."""
        return Spent(self.state.steps, self.epochs, self.state.seconds)


def save_checkpoint(folder: Path, training: Training) -> Path:
    """Write `folder/step-N`, and then drop all but the newest few.

    Raises:
        RunError: the disk is full or can't be written; the earlier checkpoints are whole.
    """
    target = folder / f"step-{training.state.steps:08d}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(target) as stage:
        write_tensors(stage / "model.safetensors", weights_of(training.model))
        write_tensors(stage / "optimiser.safetensors", optimiser_tensors(training.model, training.optimiser))
        write_tensors(stage / "random.safetensors", random_state())
        if training.average is not None:
            write_tensors(stage / "average.safetensors", training.average.tensors())
        if training.best:
            write_tensors(stage / "best.safetensors", training.best)
        numbers = {"state": asdict(training.state), "batches": training.batches.state()}
        (stage / "state.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def random_state() -> Weights:
    """Return the state of PyTorch's random generators, from which all others here are seeded."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def restore_checkpoint(folder: Path, training: Training) -> bool:
    """Go back to the newest whole checkpoint in `folder`; return False if there is none.

    Raises:
        RunError: there are checkpoints but none of them is whole.
    """
    faults = []
    for path in reversed(_found(folder)):
        try:
            check_manifest(path)
        except WeightsError as error:
            faults.append(str(error))
            continue
        _restore(path, training)
        return True
    if faults:
        raise RunError(f"no checkpoint in {folder} is whole: {faults[0]}")
    return False


def _restore(path: Path, training: Training) -> None:
    held = read_tensors(path / "model.safetensors")
    with torch.no_grad():
        for name, tensor in weights_of(training.model).items():
            tensor.copy_(held[name])
    restore_optimiser(training.model, training.optimiser, dict(read_tensors(path / "optimiser.safetensors")))
    if training.average is not None:
        training.average.restore(_to_device(path / "average.safetensors", training))
    if (path / "best.safetensors").exists():
        training.best = _to_device(path / "best.safetensors", training)
    numbers: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    training.state = State(**numbers["state"])
    training.batches.restore(numbers["batches"])
    random = read_tensors(path / "random.safetensors")
    torch.set_rng_state(random["cpu"].clone())
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"].clone())


def _to_device(path: Path, training: Training) -> Weights:
    device = next(training.model.parameters()).device
    return {name: tensor.to(device, copy=True) for name, tensor in read_tensors(path).items()}


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())
