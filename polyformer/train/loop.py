"""The one training loop: batches in, steps of the optimiser, evaluations, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from polyformer.data.reader import Reader, TrainingBatch
from polyformer.errors import RunError
from polyformer.parts.contract import contract_of
from polyformer.parts.kernels.features import redraw
from polyformer.parts.model import TransformerPart
from polyformer.parts.stack import StackPart
from polyformer.train.averages import Weights, weights_of
from polyformer.train.checkpoints import Training, save_checkpoint
from polyformer.train.journal import Journal
from polyformer.train.objectives import LIKELIHOOD, Aim
from polyformer.train.optimisers import clip_gradients
from polyformer.train.recipe import TrainRecipe

Ending = Literal["budget", "early", "interrupted"]


@dataclass
class Company:
    """What the loop reports to.

    Attributes:
        checkpoints: the folder that they go to.
        validation: the batches of the validation set.
        aim: what is minimised, and measured on those.
        after_epoch: what is done with the model when an epoch, of this number, is over; it draws no numbers from
            PyTorch's generator.
    """

    checkpoints: Path
    journal: Journal
    validation: Reader[Any]
    aim: Aim = LIKELIHOOD
    after_epoch: Callable[[TransformerPart, int], None] | None = None


def run(training: Training, recipe: TrainRecipe, company: Company) -> Ending:
    """Train until the budget is used, validation stops improving, or an interrupt asks to stop.

    An interrupt (SIGINT, SIGTERM) is taken after the step at hand, whose checkpoint is saved; a second one stops
    at once.
    """
    training.model.train()
    _refuse_recompute(training.model, recipe)
    ending: Ending = "budget"
    saved = time.monotonic()
    with _interrupts() as asked:
        clock = time.monotonic()
        while (share := recipe.budget.share(training.spent())) < 1:
            epoch = training.batches.epoch
            _step(training, recipe, share, company.aim)
            now = time.monotonic()
            training.state.seconds += now - clock
            training.state.window[3] += now - clock
            clock = now
            if training.state.steps % recipe.log_every == 0:
                _log(training, recipe, company.journal)
            if recipe.budget.share(training.spent()) * recipe.evaluations >= training.state.evaluations + 1:
                evaluate(training, recipe, company)
                if recipe.patience and training.state.worse >= recipe.patience:
                    ending = "early"
            if company.after_epoch is not None and training.batches.epoch > epoch:
                with using(training.model, candidate(training)):
                    company.after_epoch(training.model, training.batches.epoch)
            due = now - saved > recipe.checkpoint_minutes * 60
            if asked or due:
                _save(training, company)
                saved = time.monotonic()
            training.state.seconds += time.monotonic() - clock
            clock = time.monotonic()
            if asked:
                return "interrupted"
            if ending == "early":
                break
    if training.state.window[2]:
        _log(training, recipe, company.journal)
    _save(training, company)
    return ending


def accumulate(
    model: TransformerPart, batches: Sequence[TrainingBatch], recipe: TrainRecipe, aim: Aim = LIKELIHOOD
) -> tuple[float, float, int]:
    """Add the gradients of one step; return its sums of objective and likelihood, and its tokens.

    Each batch's sum is divided by the tokens of the whole step, so that a step in several batches is the step in
    one: a mean of the batches' means would weigh the tokens of short batches more.
    """
    tokens = sum(batch.target_tokens for batch in batches)
    sums = [0.0, 0.0]
    for stack in model.modules():
        if isinstance(stack, StackPart):
            stack.recompute = recipe.recompute == "blocks"
    for batch in batches:
        with precision(recipe):
            loss = aim.loss(model, batch, recipe.smoothing)
        (loss.objective / tokens).backward()  # type: ignore[no-untyped-call]
        sums[0] += float(loss.objective.detach())
        sums[1] += float(loss.likelihood)
    return sums[0], sums[1], tokens


def _refuse_recompute(model: TransformerPart, recipe: TrainRecipe) -> None:
    clash = contract_of(model.spec).get("checkpointed")
    if recipe.recompute == "blocks" and clash is not None:
        raise RunError(f"{clash.part} can't be trained with recompute=blocks: {clash.term.why}")


def precision(recipe: TrainRecipe) -> AbstractContextManager[Any]:
    """Return the context in which forward passes run: autocast to bfloat16, or nothing."""
    if recipe.precision == "bf16":
        return torch.autocast("cuda" if recipe.device == "cuda" else "cpu", torch.bfloat16)
    return nullcontext()


def _step(training: Training, recipe: TrainRecipe, share: float, aim: Aim) -> None:
    state = training.state
    batches = [next(training.batches) for _ in range(recipe.accumulate)]
    objective, likelihood, tokens = accumulate(training.model, batches, recipe, aim)
    norm = clip_gradients(training.model, recipe.clip or None)
    if math.isfinite(norm) and math.isfinite(objective):
        state.rate = recipe.schedule.rate(state.steps + 1, share)
        for group in training.optimiser.param_groups:
            group["lr"] = state.rate
        training.optimiser.step()
        if training.average is not None:
            training.average.step(training.model)
    elif recipe.not_finite == "stop":
        raise RunError(
            f"the loss or its gradient is not finite at step {state.steps + 1} (loss {objective / tokens:.3g}, "
            f"gradient norm {norm:.3g}); the last checkpoint is whole: lower the learning rate or the clipping limit"
        )
    else:
        state.skipped += 1
        objective = likelihood = 0.0
        tokens = 0
    training.optimiser.zero_grad(set_to_none=True)
    state.steps += 1
    redraw(training.model, state.steps)
    state.tokens += tokens
    for i, value in enumerate((objective, likelihood, tokens)):
        state.window[i] += value


def _log(training: Training, recipe: TrainRecipe, journal: Journal) -> None:
    state = training.state
    objective, likelihood, tokens, seconds = state.window
    state.window = [0.0, 0.0, 0.0, 0.0]
    share = recipe.budget.share(training.spent())
    journal.write(
        {
            "step": state.steps,
            "epoch": round(training.epochs, 4),
            "loss": likelihood / max(tokens, 1),
            "objective": objective / max(tokens, 1),
            "learning_rate": state.rate,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "share": round(share, 5),
        }
    )


def evaluate(training: Training, recipe: TrainRecipe, company: Company) -> float:
    """Measure the validation loss of the weights that would be kept, write it down and remember the best."""
    state = training.state
    state.evaluations = int(recipe.budget.share(training.spent()) * recipe.evaluations)
    if training.average is not None:
        training.average.mark(training.model)
    with using(training.model, candidate(training)):
        with precision(recipe):
            loss = company.aim.held_out(training.model, company.validation.in_order()).loss
        if state.best is None or loss < state.best:
            state.best, state.worse = loss, 0
            if recipe.patience:
                training.best = {n: t.detach().clone() for n, t in weights_of(training.model).items()}
        else:
            state.worse += 1
    company.journal.write(
        {"step": state.steps, "validation_loss": loss, "validation_perplexity": math.exp(min(loss, 50))}
    )
    return loss


def candidate(training: Training) -> Weights:
    """Return the weights that would be kept now: the average where there is one."""
    average = None if training.average is None else training.average.weights()
    return average or {}


@contextmanager
def using(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let the model have other weights for a while; none given: its own."""
    own = weights_of(model)
    held = {name: own[name].detach().clone() for name in weights}
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in held.items():
                own[name].copy_(tensor)


def _save(training: Training, company: Company) -> None:
    training.state.metrics_bytes = company.journal.sync()
    save_checkpoint(company.checkpoints, training)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never cut in two; a second one gets through."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread: whoever runs it takes care of signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
