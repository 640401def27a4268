"""Many texts at once: continuous batching over the slots of a `Runner`, within a budget of memory.

Each step takes a row of every text that is being written, and fills up with pieces of the prompts of those that are
to be written next. A text is never lost: when memory is short, the one that was let in last gives its slot up, waits,
and is computed anew from the tokens it had.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyformer.errors import RunError, SpecError, suggest
from polyformer.generate.processors import refuse_unknown
from polyformer.generate.queueing import FairQueue
from polyformer.generate.requests import Handle, Job, Request
from polyformer.generate.runner import Counts, Rows, Runner, refuse
from polyformer.generate.sampling import scored
from polyformer.generate.scores import finite, log_sums
from polyformer.generate.speculative import Guess, Guesser, Guesses, Speculation, Trial, judge
from polyformer.generate.table import Slots
from polyformer.spec import Record

if TYPE_CHECKING:
    from polyformer.generate.scores import Scores
    from polyformer.parts.flow import Mix

NOTHING = Guess([])


class Capacity(Record):
    """What an engine may use.

    Attributes:
        memory: bytes that caches may take, or None for as much as the slots can hold.
        rows: how many rows a step has at most. Prompts are read in pieces of this size; a smaller one makes those
            who are writing wait less for them.
        waiting: how many requests may wait.
        kept: how many finished texts stay in the cache, for requests that begin as they do.
    """

    memory: int | None = None
    rows: int = 256
    waiting: int = 4096
    kept: int = 0

    def check(self) -> None:
        self.require(self.memory is None or self.memory > 0, f"memory must be at least 1 byte, not {self.memory}")
        self.require(self.rows > 0, f"rows must be at least 1, not {self.rows}")
        self.require(self.waiting > 0, f"waiting must be at least 1, not {self.waiting}")
        self.require(self.kept >= 0, f"kept can't be negative, as {self.kept}")


@dataclass
class Part:
    """The rows of one text in a step, and whether they are all that it has, so that its next token can be chosen."""

    job: Job
    slot: int
    held: int
    ids: list[int]
    whole: bool
    guess: Guess = NOTHING

    @property
    def rows(self) -> list[int]:
        """The tokens of all its rows, guesses too."""
        return self.ids + self.guess.ids


class Engine:
    """Answers requests together, each as it would be answered alone.

    Everything may be called from any thread. `step` does the work; who iterates over a handle calls it, so that an
    engine needs no thread of its own.

    With a `guesser`, texts are written by speculative decoding: greedy ones as without it, drawn ones by the same
    distribution, though by other draws. `guesses` tells how that goes; where it doesn't pay, it is left off by itself.
    """

    def __init__(
        self,
        runner: Runner,
        capacity: Capacity | None = None,
        guesser: Guesser | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.runner, self.capacity, self.counts = runner, capacity or Capacity(), Counts()
        self.guesser, self.speculation, self.guesses = guesser, speculation or Speculation(), Guesses()
        self._trials: dict[int, Trial] = {}
        self._lock = threading.RLock()
        self._inbox: deque[Job] = deque()
        self._queue: FairQueue[Job] = FairQueue()
        self._slots = Slots(runner, self.capacity.kept)
        self._active: list[Job] = []
        self._numbers = itertools.count()
        if self.capacity.memory is not None or guesser is not None:
            runner.bytes_for(1)  # which may have to be measured, and nothing else may run meanwhile

    def submit(self, request: Request) -> Handle:
        """Take a request, which is begun when its turn comes.

        Raises:
            SpecError: a request that could never be answered: a prompt that is empty, too long, or of other ids than
                the model has; one that needs more memory than there is; or an unknown adapter.
            RunError: too many requests wait already.
        """
        limit = self._limit(request)
        self._check(request, limit)
        if len(self._inbox) + len(self._queue) >= self.capacity.waiting:
            raise RunError(f"{self.capacity.waiting:,} requests wait already; send this one again later")
        job = Job(next(self._numbers), request, limit, self._mix(request))
        self._inbox.append(job)
        return Handle(self, job)

    def step(self) -> bool:
        """Let requests in, run the model once, and hand out what was written; return whether there is more to do."""
        with self._lock:
            while self._inbox:
                job = self._inbox.popleft()
                self._queue.push(job.request.user, job)
            self._give_up()
            self._let_in()
            self._make_room()
            parts = self._parts()
            if parts:
                self._run(parts)
            self._queue.settle({job.request.user for job in self._active})
            return bool(self._active or len(self._queue) or self._inbox)

    def work(self) -> None:
        """Do all that there is to do."""
        while self.step():
            pass

    def forget(self) -> None:
        """Give back the memory of finished texts."""
        with self._lock:
            self._slots.forget()

    @property
    def bytes(self) -> int:
        """Memory that caches take now."""
        return self.runner.bytes

    def _limit(self, request: Request) -> int:
        positions, prompt = self.runner.positions, len(request.prompt)
        return request.settings.limit if positions is None else min(request.settings.limit, positions - prompt + 1)

    def _mix(self, request: Request) -> Mix | None:
        if request.adapter is None:
            return None
        mix = {request.adapter: 1.0} if isinstance(request.adapter, str) else dict(request.adapter)
        known = self.runner.adapters
        for name in mix:
            if name not in known:
                near = suggest(name, known) or " (here no request can name one)"
                raise SpecError(f"there is no adapter called '{name}'{near}")
        return mix

    def _check(self, request: Request, limit: int) -> None:
        runner, prompt, source = self.runner, request.prompt, request.source
        refuse(runner, prompt, source)
        refuse_unknown(request.settings.processors, runner.vocabulary)
        if request.settings.stop and request.decoder is None:
            raise SpecError("stop strings need a decoder that turns ids into text")
        if request.seconds is not None and not request.seconds > 0:
            raise SpecError(f"an answer can't be given within {request.seconds} seconds")
        needed = 0 if self.capacity.memory is None else runner.bytes_for(len(prompt) + limit - 1, len(source or ()))
        if self.capacity.memory is not None and needed > self.capacity.memory:
            raise SpecError(
                f"a prompt of {len(prompt)} tokens with up to {limit} more takes {needed:,} bytes of cache, but there "
                f"are {self.capacity.memory:,}; lower the limit or give the engine more memory"
            )

    def _give_up(self) -> None:
        """End what was cancelled or took too long."""
        now = time.monotonic()
        for job in [*self._active, *self._queue.items()]:
            late = job.deadline is not None and now > job.deadline
            if not (job.cancelled or late):
                continue
            if job.slot is None:
                self._queue.take(job, job.request.user)
            job.finish("cancelled" if job.cancelled else "deadline")
            self._leave(job)

    def _let_in(self) -> None:
        """Give slots to those whose turn it is, as long as there are slots and memory."""
        while len(self._queue):
            job = self._queue.peek()
            if self._active and not self._fits(job):
                return
            slot = self._slots.free(job)
            if slot is None:
                return
            self._queue.pop()
            self._shrink(job)
            try:
                reused = self._slots.take(slot, job)
            except Exception as error:
                self._slots.give_back(job)
                job.fail(error)
                continue
            except BaseException:  # an interrupt: it is not lost
                self._slots.give_back(job)
                self._queue.push(job.request.user, job, first=True)
                raise
            job.reused = max(job.reused, reused)
            self.counts.reused += reused
            self._active.append(job)

    def _fits(self, *more: Job) -> bool:
        """Tell whether there is memory for all that is written now, and more, and their next tokens."""
        memory = self.capacity.memory
        return memory is None or sum(self._takes(job) for job in (*self._active, *more)) <= memory

    def _takes(self, job: Job) -> int:
        return self.runner.bytes_for(job.length, job.source_length)

    def _make_room(self) -> None:
        """Let the last ones wait again where all together need too much; what is kept of others goes first."""
        memory = self.capacity.memory
        if memory is None:
            return
        while len(self._active) > 1 and not self._fits():
            job = self._active.pop()
            self._slots.give_back(job)
            self._forget_guesses(job)
            self._queue.push(job.request.user, job, first=True)
            self.counts.preempted += 1
        self._shrink()

    def _shrink(self, *more: Job) -> None:
        """Give up of what is kept what there is no memory for beside all that is written, and more."""
        if self.capacity.memory is not None:
            self._slots.shrink(self.capacity.memory - sum(self._takes(job) for job in (*self._active, *more)))

    def _parts(self) -> list[Part]:
        """Choose the rows of a step: one of each text that is being written, then pieces of prompts."""
        found, room = [], self.capacity.rows
        held = {job.number: self._slots.length(job) for job in self._active}
        writing = [job for job in self._active if job.length - held[job.number] == 1]
        reading = [job for job in self._active if job.length - held[job.number] > 1]
        room = max(room - len(writing), 1)
        for job in writing + reading:
            start = held[job.number]
            count = 1 if job.length - start == 1 else min(job.length - start, room)
            if count == 0:
                break
            room -= count if job.length - start > 1 else 0
            assert job.slot is not None
            part = Part(job, job.slot, start, job.pending(start, count), start + count == job.length)
            part.guess = self._guess(part)
            found.append(part)
        return found

    def _guess(self, part: Part) -> Guess:
        """Return guesses of how a text goes on, where that may pay and there is room for them."""
        job = part.job
        if self.guesser is None or not part.whole or len(part.ids) > 1:
            return NOTHING
        trial = self._trials.setdefault(job.number, Trial(self.speculation, self.guesser.cost))
        left = job.limit - len(job.text.ids) - 1
        if self.runner.positions is not None:
            left = min(left, self.runner.positions - job.length)
        count = min(self.speculation.count, self.runner.retracts, left)
        if trial.stopped or count < 1 or not self._has_room_for(count):
            return NOTHING
        try:
            return self.guesser.guess(job.number, job.text, count, job.chooser)
        except Exception:  # the text is written without guesses, and says itself what is wrong with it
            trial.stopped = True
            return NOTHING

    def _has_room_for(self, more: int) -> bool:
        """Tell whether there is memory for so many guesses for each text."""
        memory = self.capacity.memory
        if memory is None:
            return True
        takes = (self.runner.bytes_for(job.length + more, job.source_length) for job in self._active)
        return self._slots.kept_bytes + sum(takes) <= memory

    def _run(self, parts: list[Part]) -> None:
        """Run the model on rows of several texts. Where that fails, each is run alone, and fails alone."""
        try:
            scores = self._scores(parts)
        except Exception as error:
            if len(parts) == 1:
                parts[0].job.fail(error)
                self._leave(parts[0].job)
                return
            for part in parts:
                self._run([part])
            return
        for part in parts:
            self.counts.rows += len(part.rows)
            self._queue.charge(part.job.request.user, len(part.rows))
            self._slots.held(part.job, part.ids)
        self._write([part for part in parts if part.whole], scores)

    def _scores(self, parts: list[Part]) -> Scores:
        rows = Rows([], [], [])
        wanted: list[int] = []
        for part in parts:
            ids = part.rows
            rows.slots.extend([part.slot] * len(ids))
            rows.positions.extend(range(part.held, part.held + len(ids)))
            rows.ids.extend(ids)
            if part.whole:
                wanted.extend(range(len(rows.ids) - len(part.guess.ids) - 1, len(rows.ids)))
        self.counts.steps += 1
        return self.runner.step(rows, wanted)

    def _write(self, parts: list[Part], scores: Scores) -> None:
        """Choose the next tokens of each text by its scores, which are rows of [W, V]."""
        if not parts:
            return
        normalisers = log_sums(scores)
        real = finite(normalisers)
        start = 0
        for part in parts:
            here = slice(start, start + len(part.guess.ids) + 1)
            start = here.stop
            try:
                if not all(real[here]):
                    raise RunError("the model gives scores that are no numbers; its weights may be damaged")
                self._choose(part, scores[here], normalisers[here])
            except Exception as error:
                part.job.fail(error)
            if part.job.reason is not None:
                self._leave(part.job)

    def _choose(self, part: Part, scores: Scores, normalisers: Scores) -> None:
        """Write what is chosen by scores behind a text and its guesses; guesses that aren't taken are forgotten."""
        job, guess = part.job, part.guess
        if guess.ids:
            chosen = judge(scores, guess, job.text, job.chooser)
            taken = len(chosen) - 1 + (chosen[-1] in job.text.ends and chosen == guess.ids[: len(chosen)])
            self._slots.held(job, chosen[:-1])
            self.runner.truncate(part.slot, part.held + len(part.ids) + len(chosen) - 1)
            self.guesses.note(len(guess.ids), taken)
            trial = self._trials[job.number]
            trial.note(len(guess.ids), taken)
            self.guesses.stopped += trial.stopped
        else:
            chosen = [job.chooser.choose(scores[0], job.text)]
        shown = job.request.settings.shown
        for one in scored(scores[: len(chosen)], normalisers[: len(chosen)], chosen, shown):
            if job.reason is None:
                job.write(one)
                self.counts.written += 1

    def _forget_guesses(self, job: Job) -> None:
        self._trials.pop(job.number, None)
        if self.guesser is not None:
            self.guesser.forget(job.number)

    def _leave(self, job: Job) -> None:
        """Take a finished text out; its cache is kept for others like it, or given back."""
        if job in self._active:
            self._active.remove(job)
        self._forget_guesses(job)
        if job.slot is not None:
            if job.error is None:
                self._slots.keep(job)
            else:
                self._slots.give_back(job)
