"""Cost curves of attention: time and memory of each contestant, forward and in training, over the length."""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from polyformer.bench.contestants import DENSE, At, Contestant, chosen
from polyformer.bench.fits import Power, crossing, expected, fit_power, less_from
from polyformer.bench.memory import Memory, available_memory, memory_of
from polyformer.bench.work import HeadSizes, Mode, Work, refusal, spec_of
from polyformer.spec import Record

MODES: tuple[Mode, ...] = ("forward", "training")
Quantity = Literal["seconds", "bytes"]
PROBE = 256
"""The length at which each contestant is tried first, so that what a longer one will take can be told."""
STRIDE = 4
"""How many times as long a text may be as the last one by which it is told."""
SHORTEST = 0.005
"""Seconds of a sample: quicker runs are repeated, and their mean taken."""


class Conditions(Record):
    """How it is measured.

    Attributes:
        rounds: how often every contestant has its turn at each length; the median counts.
        budget: seconds that one contestant may take at one length, forward or in training; it has at least one turn if
            that fits.
        memory: gigabytes that one run may take; None is four fifths of what the system has left.
        threads: of PyTorch; None leaves them as they are.
        clock: "wall": the time that passes; "processor": the time that processors spent, all threads together. With
            one thread, that is what would have passed had no other program been running.
    """

    rounds: int = 7
    budget: float = 20.0
    memory: float | None = None
    threads: int | None = None
    clock: Literal["wall", "processor"] = "wall"

    def check(self) -> None:
        self.require(self.rounds > 0, f"rounds must be at least 1, not {self.rounds}")
        self.require(self.budget > 0, f"budget must be above 0 seconds, not {self.budget:g}")
        self.require(self.memory is None or self.memory > 0, "memory must be above 0 gigabytes")
        self.require(self.threads is None or self.threads > 0, "threads must be at least 1")


class Settings(Record):
    """What is measured.

    Attributes:
        lengths: of the texts; they are put in order.
        only: names of contestants (`CONTESTANTS`); none means all.
        fit_from: the least length that counts in fits.
        sizes, conditions: see there.
    Raises:
        SpecError: no contestant has such a name, or one of them can't have these sizes.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    only: tuple[str, ...] = ()
    fit_from: int = 2048
    sizes: HeadSizes = HeadSizes()
    conditions: Conditions = Conditions()

    def check(self) -> None:
        self.require(len(self.lengths) > 0, "lengths must name at least one")
        self.require(min(self.lengths) > 0, f"lengths must be at least 1, not {min(self.lengths)}")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        for one in chosen(self.only):
            spec_of(one, self.sizes, self.lengths[-1])


@dataclass(frozen=True)
class Cell:
    """One contestant at one length, forward or in training.

    Attributes:
        times: seconds of each round's run.
        bytes: the most memory that its tensors took, above inputs and answers; None if it was not measured.
        skipped: why it was not measured; empty if it was.
    """

    contestant: str
    length: int
    mode: Mode
    times: tuple[float, ...] = ()
    bytes: int | None = None
    skipped: str = ""

    @property
    def seconds(self) -> float | None:
        """The median time."""
        return statistics.median(self.times) if self.times else None

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        data: dict[str, Any] = {"contestant": self.contestant, "length": self.length, "mode": self.mode}
        if self.skipped:
            return {**data, "skipped": self.skipped}
        return {**data, "seconds": self.seconds, "times": list(self.times), "bytes": self.bytes}


@dataclass(frozen=True)
class Curves:
    """All that was measured, and what follows from it."""

    settings: Settings
    contestants: tuple[Contestant, ...]
    cells: tuple[Cell, ...]
    machine: dict[str, Any]

    def points(self, name: str, mode: Mode, quantity: Quantity) -> dict[int, float]:
        """Return what a contestant cost, by length."""
        own = [cell for cell in self.cells if (cell.contestant, cell.mode) == (name, mode)]
        found = {cell.length: getattr(cell, quantity) for cell in own}
        return {length: float(cost) for length, cost in found.items() if cost is not None}

    def fit(self, name: str, mode: Mode, quantity: Quantity) -> Power | None:
        """Return how a contestant's cost grows; None for fewer than two lengths from `fit_from` on."""
        return fit_power(list(self.points(name, mode, quantity).items()), self.settings.fit_from)

    def crossing(self, name: str, mode: Mode) -> tuple[float | None, int | None]:
        """Return from which length on a contestant is faster than causal `scaled_dot_product_attention`: by the fits,
        and the first measured one from which on it always is."""
        fitted = crossing(self.fit(name, mode, "seconds"), self.fit(DENSE, mode, "seconds"))
        return fitted, less_from(self.points(name, mode, "seconds"), self.points(DENSE, mode, "seconds"))

    def ratios(self, name: str, mode: Mode, against: str, quantity: Quantity = "seconds") -> dict[int, float]:
        """Return how many times what a contestant costs another costs, by length."""
        own, other = self.points(name, mode, quantity), self.points(against, mode, quantity)
        return {n: other[n] / own[n] for n in sorted(own.keys() & other.keys()) if own[n] > 0}

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON: machine, settings, contestants, cells, fits, crossings and ratios."""
        return {
            "machine": self.machine,
            "settings": dataclasses.asdict(self.settings),
            "contestants": [self._described(one) for one in self.contestants],
            "cells": [cell.to_data() for cell in self.cells],
            "fits": [
                {"contestant": one.name, "mode": mode, "quantity": quantity, **dataclasses.asdict(fit)}
                for one in self.contestants
                for mode in MODES
                for quantity in ("seconds", "bytes")
                if (fit := self.fit(one.name, mode, quantity)) is not None
            ],
            "crossings": [
                {"contestant": one.name, "mode": mode, "against": DENSE, "fitted": fitted, "measured": measured}
                for one in self.contestants
                for mode in MODES
                if one.name != DENSE
                for fitted, measured in (self.crossing(one.name, mode),)
            ],
            "ratios": [
                {"contestant": one.name, "mode": mode, "against": against, "length": n, "times_as_fast": ratio}
                for one in self.contestants
                for mode in MODES
                for against in dict.fromkeys((DENSE, one.dense))
                if one.name != against
                for n, ratio in self.ratios(one.name, mode, against).items()
            ],
        }

    def _described(self, one: Contestant) -> dict[str, Any]:
        sizes, length = self.settings.sizes, self.settings.lengths[-1]
        spec, rule = spec_of(one, sizes, length), one.rule(At(sizes.heads, sizes.head, length))
        return {
            "name": one.name,
            "kind": one.kind,
            "rule": {"type": type(rule).__name__, **rule.to_data()},
            "spec": {"type": type(spec).__name__, **spec.to_data()},
            "linear_from": one.linear,
            "dense": one.dense,
        }


def bench_attention(settings: Settings, progress: Callable[[int], None] = lambda count: None) -> Curves:
    """Measure attentions.

    At each length, forward and then in training, each runs once while its memory is counted, which warms it up too;
    then all take turns, round by round and in turned order, so that the machine's moods reach them alike. What would
    take too long or too much memory, by what it took at shorter lengths, is skipped, and the cell says so.

    Args:
        progress: is told of each cell that was measured or skipped.
    """
    contestants = chosen(settings.only)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.conditions.threads or threads)
    try:
        cells = _Bench(settings, contestants, progress).run()
        return Curves(settings, tuple(contestants), tuple(cells), machine())
    finally:
        torch.set_num_threads(threads)


class _Bench:
    """The course of the measuring: what is known so far of each contestant, and the cells."""

    def __init__(self, settings: Settings, contestants: list[Contestant], progress: Callable[[int], None]) -> None:
        self.settings, self.contestants, self.progress = settings, contestants, progress
        self.seen: dict[tuple[str, Mode], list[tuple[int, Memory]]] = {}

    def run(self) -> list[Cell]:
        first = min(PROBE, self.settings.lengths[0])
        for one in self.contestants:
            for mode in MODES:
                for _ in range(2):  # what is only needed once, such as compiling, is not to be foretold
                    self._watch(one, mode, first)
        return [cell for n in self.settings.lengths for mode in MODES for cell in self._compare(n, mode)]

    def _compare(self, length: int, mode: Mode) -> list[Cell]:
        """Measure all contestants at one length."""
        works: dict[str, Work] = {}
        found: dict[str, Cell] = {}
        for one in self.contestants:
            why = self._too_much(one, mode, length)
            watched = why or self._watch(one, mode, length)
            if isinstance(watched, str):
                found[one.name] = Cell(one.name, length, mode, skipped=watched)
            else:
                works[one.name], memory = watched
                found[one.name] = Cell(one.name, length, mode, bytes=memory.extra)
            self.progress(1)
        for name, times in self._take_turns(works, mode).items():
            found[name] = dataclasses.replace(found[name], times=tuple(times))
        return list(found.values())

    def _take_turns(self, works: dict[str, Work], mode: Mode) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in works}
        clock = time.perf_counter if self.settings.conditions.clock == "wall" else time.process_time
        spent = dict.fromkeys(works, 0.0)
        for turn in range(self.settings.conditions.rounds):
            for name in list(works)[:: -1 if turn % 2 else 1]:
                last = self.seen[name, mode][-1][1].seconds if not times[name] else max(times[name])
                if times[name] and spent[name] + last > self.settings.conditions.budget:
                    continue
                repeat = max(1, min(math.ceil(SHORTEST / max(last, 1e-6)), 100))
                run, started = works[name].runs(mode), clock()
                for _ in range(repeat):
                    run()
                took = clock() - started
                times[name].append(took / repeat)
                spent[name] += took
        return times

    def _watch(self, one: Contestant, mode: Mode, length: int) -> tuple[Work, Memory] | str:
        """Run a contestant once and count its memory; a text says why it can't."""
        try:
            work = Work(one, self.settings.sizes, length)
            work.forget()
            memory = memory_of(work.runs(mode))
        except (RuntimeError, MemoryError, ValueError) as error:
            return refusal(error)
        known = self.seen.setdefault((one.name, mode), [])
        known[:] = [each for each in known if each[0] != length] + [(length, memory)]
        return work, memory

    def _too_much(self, one: Contestant, mode: Mode, length: int) -> str:
        """Return why a contestant is not tried at a length, by what it takes at shorter ones.

        Nothing is foretold far: what was not asked for is tried in between, as long as that isn't too much either.
        """
        known = self.seen.get((one.name, mode), [])
        while known and known[-1][0] * STRIDE < length and not self._beyond(one, mode, known[-1][0] * STRIDE):
            if isinstance(self._watch(one, mode, known[-1][0] * STRIDE), str):
                break
        return self._beyond(one, mode, length)

    def _beyond(self, one: Contestant, mode: Mode, length: int) -> str:
        """Return which limit a run would exceed, by what the last ones took."""
        known, conditions, sizes = self.seen.get((one.name, mode), []), self.settings.conditions, self.settings.sizes
        if not known:
            return ""
        least = 2.0 if one.kind in ("dense", "exact") else 1.0
        seconds = expected([(n, each.seconds) for n, each in known], length, least)
        if seconds > conditions.budget:
            return f"a run would take about {seconds:.3g} s, more than --budget {conditions.budget:g}"
        matrices = sizes.heads * sizes.batch * (2 if mode == "training" else 1)
        square = one.square(length, matrices)
        needed = max(expected([(n, float(each.peak)) for n, each in known], length, 1.0, 2.0), square)
        limit = 0.8 * available_memory() if conditions.memory is None else conditions.memory * 1e9
        if needed > limit:
            return (
                f"a run would take about {needed / 1e9:.3g} GB of memory, more than the {limit / 1e9:.3g} GB there are"
            )
        return ""


def machine() -> dict[str, Any]:
    """Return what the figures are of: processor, threads, memory and versions."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "system": platform.platform(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "memory_available": available_memory(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "polyformer": version("polyformer"),
    }
