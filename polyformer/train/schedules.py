"""How long a run lasts and how the learning rate moves over it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from polyformer.spec import Record


@dataclass(frozen=True)
class Spent:
    """What a run has used so far: optimiser steps, passes over the data (fractional), seconds of training."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0


class Budget(Record, abstract=True):
    """When a run ends."""

    def share(self, spent: Spent) -> float:
        """Return how much of the budget is used, 1.0 or more when the run is over."""
        raise NotImplementedError


class Steps(Budget):
    """So many optimiser steps. The only budget under which two runs are equal bit for bit, along with `Epochs`."""

    count: int

    def check(self) -> None:
        self.require(self.count > 0, "count must be at least 1")

    def share(self, spent: Spent) -> float:
        return spent.steps / self.count


class Epochs(Budget):
    """So many passes over the training data."""

    count: float

    def check(self) -> None:
        self.require(self.count > 0, "count must be above 0")

    def share(self, spent: Spent) -> float:
        return spent.epochs / self.count


class Minutes(Budget):
    """So much wall time, evaluations and checkpoints included; a resumed run goes on with what is left."""

    count: float

    def check(self) -> None:
        self.require(self.count > 0, "count must be above 0")

    def share(self, spent: Spent) -> float:
        return spent.seconds / 60 / self.count


class Schedule(Record, abstract=True):
    """The learning rate: a linear warm-up to `peak` over `warmup` steps, and what the kind does afterwards."""

    peak: float = 1e-3
    warmup: int = 0

    def check(self) -> None:
        self.require(self.peak > 0, "peak must be above 0")
        self.require(self.warmup >= 0, "warmup can't be negative")

    def rate(self, step: int, share: float) -> float:
        """Return the rate of step 1, 2, … when `share` of the budget was used before it."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        return self.peak * self.after(step, share)

    def after(self, step: int, share: float) -> float:
        """Return the factor after the warm-up."""
        raise NotImplementedError


class Constant(Schedule):
    """`peak` for good."""

    def after(self, step: int, share: float) -> float:
        return 1.0


class Noam(Schedule):
    """Inverse square root of the step (Vaswani et al. 2017, section 5.3).

    The paper's d^-0.5 · min(step^-0.5, step · warmup^-1.5) has its peak (d · warmup)^-0.5 at the end of the
    warm-up; here the peak is a number of its own: for the paper's base model 7.0e-4 with 4000 steps.
    """

    def after(self, step: int, share: float) -> float:
        return math.sqrt(max(self.warmup, 1) / max(step, 1))


class Decay(Schedule):
    """Down a straight line to `floor` · peak at the end of the budget."""

    floor: float = 0.0

    def after(self, step: int, share: float) -> float:
        return self.floor + (1 - self.floor) * max(0.0, 1 - share)


class Cosine(Schedule):
    """Down half a cosine to `floor` · peak at the end of the budget (Loshchilov and Hutter 2017)."""

    floor: float = 0.0

    def after(self, step: int, share: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
