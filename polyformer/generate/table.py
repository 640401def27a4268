"""Which slot holds what: the texts that are being written, and finished ones that others may begin with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from polyformer.generate.requests import Job
from polyformer.generate.runner import Runner

WORTH = 16
"""Tokens that a text must share with another for its cache to be copied."""


@dataclass(eq=False)
class Held:
    """What a slot holds.

    Attributes:
        slot: its number.
        ids: the tokens.
        source: those of its source, or None.
        version: the weights that it was computed with, and the adapters.
        job: who is writing in it, or None.
    """

    slot: int
    ids: list[int]
    source: Sequence[int] | None
    version: Hashable
    job: Job | None = None


class Slots:
    """The slots of a runner. Those of finished texts are kept up to a number, the last used ones.

    A new text takes over, or copies, the cache of one that begins in the same way, with the same source and weights.
    """

    def __init__(self, runner: Runner, kept: int) -> None:
        self.runner, self.most = runner, kept
        self._used: dict[int, Held] = {}
        self._kept: list[Held] = []

    def free(self, job: Job) -> int | None:
        """Return a slot for a text, None if all are being written in; a kept one is given up for it if need be."""
        empty = next((slot for slot in range(self.runner.slots) if slot not in self._used), None)
        if empty is None and self._kept:
            best, _ = self._best(job)
            empty = (best if best is not None and best.job is None else self._kept[0]).slot
        return empty

    def take(self, slot: int, job: Job) -> int:
        """Give a slot to a text; return how many of its tokens are there already."""
        best, shared = self._best(job)
        if best is not None and best.job is None and (2 * shared >= len(best.ids) or best.slot == slot):
            slot = best.slot
            self._kept.remove(best)
            if shared < len(best.ids):
                self.runner.truncate(slot, shared)
        else:
            self._drop(slot)
            if best is not None:
                self.runner.copy(best.slot, slot, shared)
            else:
                self.runner.use(slot, job.mix)
        job.slot = slot
        source = job.request.source
        held = Held(slot, [], source, self._version(job), job)
        self._used[slot] = held
        if best is None and source is not None:
            self.runner.read({slot: source})
        if best is not None:
            held.ids = best.ids[:shared]
        return shared

    def _best(self, job: Job) -> tuple[Held | None, int]:
        """Return what a text shares most with, and how many tokens; its last one is always computed, for its scores."""
        ids = [*job.text.prompt, *job.text.ids][:-1]
        best, most, version = None, WORTH - 1, self._version(job)
        for held in self._used.values():
            if held.source != job.request.source or held.version != version:
                continue
            shared = common(held.ids, ids)
            if shared > most and shared >= self.runner.earliest(held.slot):
                best, most = held, shared
        return best, 0 if best is None else most

    def _version(self, job: Job) -> Hashable:
        return self.runner.version, job.acting

    def length(self, job: Job) -> int:
        """Return how many tokens of a text are held."""
        assert job.slot is not None
        return len(self._used[job.slot].ids)

    def held(self, job: Job, ids: Sequence[int]) -> None:
        """Say that a slot holds more tokens."""
        assert job.slot is not None
        self._used[job.slot].ids.extend(ids)

    def keep(self, job: Job) -> None:
        """Keep the cache of a finished text; the one that was kept longest gives way."""
        assert job.slot is not None
        held = self._used[job.slot]
        held.job, job.slot = None, None
        self._kept.append(held)
        while len(self._kept) > self.most:
            self._drop(self._kept[0].slot)

    def give_back(self, job: Job) -> None:
        """Empty the slot of a text."""
        if job.slot is not None:
            self._drop(job.slot)
            job.slot = None

    @property
    def kept_bytes(self) -> int:
        """Memory that finished texts take."""
        return sum(self._takes(held) for held in self._kept)

    def shrink(self, memory: int) -> None:
        """Give up what is kept until it takes no more than `memory` bytes."""
        while self._kept and self.kept_bytes > memory:
            self._drop(self._kept[0].slot)

    def forget(self) -> None:
        """Give up all that is kept."""
        while self._kept:
            self._drop(self._kept[0].slot)

    def _takes(self, held: Held) -> int:
        return self.runner.bytes_for(len(held.ids), len(held.source or ()))

    def _drop(self, slot: int) -> None:
        held = self._used.pop(slot, None)
        if held in self._kept:
            self._kept.remove(held)
        self.runner.clear(slot)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their beginning."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)
