"""Averages of weights over training: less variance and a better score for no further training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyformer.parts.part import Part
from polyformer.spec import Record

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """Return the tensors that training changes, by name (tied ones once); they are not copies.

    Frozen parameters are not among them: they are what they were when the run began.
    """
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {**{name: p for name, p in model.named_parameters() if p.requires_grad}, **buffers}


def averaged(model: nn.Module) -> Weights:
    """Return those of the model's tensors that averages are made of: all but what is drawn at random."""
    parts = [(f"{path}.", part) for path, part in model.named_modules() if isinstance(part, Part)]
    drawn = {path + name for path, part in parts for name in part.by_chance}
    return {name: tensor for name, tensor in weights_of(model).items() if name not in drawn}


class Average(Record, abstract=True):
    """Which average of the weights is evaluated and kept in the end."""

    def start(self) -> Running:
        """Return an empty running average."""
        raise NotImplementedError


class Ema(Average):
    """Exponential moving average: after each step, average += (1 - decay) · (weights - average).

    Early on the decay is held to (1 + step) / (10 + step), so that the start is soon forgotten.
    """

    decay: float = 0.999

    def check(self) -> None:
        self.require(0 < self.decay < 1, "decay must be in (0, 1)")

    def start(self) -> Running:
        return RunningEma(self.decay)


class LastCheckpoints(Average):
    """The mean of the last `count` evaluated states (Vaswani et al. 2017, section 6.1)."""

    count: int = 5

    def check(self) -> None:
        self.require(self.count > 0, "count must be at least 1")

    def start(self) -> Running:
        return RunningLast(self.count)


class Running:
    """The state of an average; what `tensors` returns and `restore` takes is saved in checkpoints."""

    def step(self, model: nn.Module) -> None:
        """Take note of the weights after an optimiser step."""

    def mark(self, model: nn.Module) -> None:
        """Take note of the weights at an evaluation."""

    def weights(self) -> Weights | None:
        """Return the average, or None before there is one."""
        raise NotImplementedError

    def tensors(self) -> Weights:
        """Return everything needed to go on."""
        raise NotImplementedError

    def restore(self, tensors: Weights) -> None:
        """Put back what `tensors` returned; it keeps these tensors as its own."""
        raise NotImplementedError


class RunningEma(Running):
    """One copy of the weights."""

    def __init__(self, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.held: Weights = {}

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        now = averaged(model)
        if not self.held:
            self.held = {name: tensor.clone() for name, tensor in now.items()}
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        held, new = [self.held[name] for name in now], [tensor.detach() for tensor in now.values()]
        torch._foreach_lerp_(held, new, 1 - decay)
        self.steps += 1

    def weights(self) -> Weights | None:
        return self.held or None

    def tensors(self) -> Weights:
        return {**self.held, "steps": torch.tensor(self.steps)} if self.held else {}

    def restore(self, tensors: Weights) -> None:
        self.held = dict(tensors)
        self.steps = int(self.held.pop("steps", torch.tensor(0)))


class RunningLast(Running):
    """The last few states themselves."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.states: list[Weights] = []

    def mark(self, model: nn.Module) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in averaged(model).items()})
        del self.states[: -self.count]

    def weights(self) -> Weights | None:
        if not self.states:
            return None
        return {name: torch.stack([s[name] for s in self.states]).mean(0) for name in self.states[0]}

    def tensors(self) -> Weights:
        return {f"{i}/{name}": tensor for i, state in enumerate(self.states) for name, tensor in state.items()}

    def restore(self, tensors: Weights) -> None:
        states: dict[int, Weights] = {}
        for key, tensor in tensors.items():
            place, _, name = key.partition("/")
            states.setdefault(int(place), {})[name] = tensor
        self.states = [states[i] for i in sorted(states)]
