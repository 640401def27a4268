"""How fast a model writes: alone and several texts at once, with and without guesses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from polyformer.errors import SpecError
from polyformer.generate import Engine, Guesses, Request, Sampling
from polyformer.spec import Record


class Writing(Record):
    """What is measured: texts of random tokens that go on greedily, all of the same lengths.

    Attributes:
        prompt: tokens of each prompt.
        written: tokens written behind each.
        together: how many texts at once, one figure for each.
        rounds: how often; medians are told. The numbers of texts take turns, so that the machine's moods reach all.
    """

    prompt: int = 128
    written: int = 32
    together: tuple[int, ...] = (1, 8)
    rounds: int = 3

    def check(self) -> None:
        self.require(self.prompt > 0, f"prompt must be at least 1, not {self.prompt}")
        self.require(self.written > 1, f"written must be at least 2, not {self.written}")
        self.require(self.rounds > 0, f"rounds must be at least 1, not {self.rounds}")
        fits = bool(self.together) and all(0 < count <= 1024 for count in self.together)
        self.require(fits, f"together must be numbers between 1 and 1024, not {self.together}")


@dataclass(frozen=True)
class Rate:
    """What was measured for one number of texts.

    Attributes:
        together: how many.
        read: tokens of prompts a second.
        written: tokens written a second, by all together, once all prompts are read.
        first: seconds until every text has its first token.
        cache: bytes of the caches at the end.
    """

    together: int
    read: float
    written: float
    first: float
    cache: int


@dataclass(frozen=True)
class Rates:
    """All rates, and how guessing went where there was any."""

    rates: list[Rate]
    guesses: Guesses

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        data: dict[str, Any] = {"rates": [asdict(rate) for rate in self.rates]}
        if self.guesses.passes:
            data |= self.guesses.to_data()
        return data


def measure(make: Callable[[int], Engine], asked: Writing) -> Rates:
    """Measure how fast engines write.

    Args:
        make: returns a new engine for so many texts at once.
    Raises:
        SpecError: a model with an encoder, or with fewer positions than the texts are long.
    """
    found: dict[int, list[Rate]] = {count: [] for count in asked.together}
    guesses = Guesses()
    for turn in range(asked.rounds):
        for count, rates in found.items():
            engine = make(count)
            rates.append(_measured(engine, count, asked, turn))
            guesses.add(engine.guesses)
    return Rates([_median(rates) for rates in found.values()], guesses)


def _measured(engine: Engine, count: int, asked: Writing, seed: int) -> Rate:
    runner = engine.runner
    if runner.reads_source:
        raise SpecError("this measures models that continue texts; one with an encoder is measured by its translations")
    if runner.positions is not None and asked.prompt + asked.written - 1 > runner.positions:
        told = f"{asked.prompt} and {asked.written} tokens are more than the model's {runner.positions} positions"
        raise SpecError(told)
    chance = torch.Generator().manual_seed(seed)
    prompts = torch.randint(runner.vocabulary, (count, asked.prompt), generator=chance).tolist()
    begun = time.perf_counter()
    handles = [engine.submit(Request(prompt, Sampling(limit=asked.written))) for prompt in prompts]
    while engine.counts.written < count:
        engine.step()
    first, before, cache = time.perf_counter(), engine.counts.written, 0
    while not all(handle.done for handle in handles):
        cache = max(cache, engine.bytes)
        engine.step()
    done = time.perf_counter()
    rate = (engine.counts.written - before) / max(done - first, 1e-9)
    return Rate(count, count * asked.prompt / (first - begun), rate, first - begun, cache)


def _median(rates: list[Rate]) -> Rate:
    values = {name: statistics.median(getattr(rate, name) for rate in rates) for name in ("read", "written", "first")}
    return Rate(rates[0].together, **values, cache=rates[0].cache)
