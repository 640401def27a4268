"""What the engine is asked, and what it answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from polyformer.errors import PolyformerError, RunError
from polyformer.generate.processors import Written
from polyformer.generate.sampling import Chooser, Sampling, Scored
from polyformer.generate.texts import Decoder, TextStream

if TYPE_CHECKING:
    from polyformer.generate.engine import Engine
    from polyformer.parts.flow import Mix

GREEDY = Sampling()

Reason = Literal["end", "limit", "stop", "cancelled", "deadline", "failed"]
"""Why a text ends: an end token, its limit, a stop string, or because it was given up."""


@dataclass(frozen=True)
class Request:
    """A text to continue, or a source to answer.

    Attributes:
        prompt: ids, at least one; for an encoder–decoder what its decoder begins with.
        settings: how it is continued.
        ends: the tokens that end a text.
        source: ids for the encoder, where there is one.
        decoder: turns ids into text, for deltas and stop strings; None for ids only.
        user: who asks; users share the engine evenly.
        seconds: how long the answer may take, waiting included; None for as long as it takes.
        adapter: which adapter of the model acts on this text, or which mix of them; none of them where it is empty,
            and those that the model is set to if None.
    """

    prompt: Sequence[int]
    settings: Sampling = GREEDY
    ends: Sequence[int] = ()
    source: Sequence[int] | None = None
    decoder: Decoder | None = None
    user: str = ""
    seconds: float | None = None
    adapter: str | Mix | None = None


@dataclass(frozen=True)
class Delta:
    """What was written since the last one: text that is whole, and the tokens, of which some may not be text yet."""

    text: str
    tokens: tuple[Scored, ...]


@dataclass(frozen=True)
class Answer:
    """What was written.

    Attributes:
        ids: without the token that ended it.
        text: without the stop string that ended it; empty where no decoder was given.
        tokens: the ids with their log-probabilities.
        log_probability: nats, the sum over them and the token that ended it.
        reason: why it ended.
        reused: how many of the prompt's tokens were not computed, but found in the cache.
    """

    ids: list[int]
    text: str
    tokens: list[Scored]
    log_probability: float
    reason: Reason
    reused: int

    @property
    def ended(self) -> bool:
        """Whether the model ended it, and not a limit or a stop string."""
        return self.reason == "end"


class Handle:
    """A request on its way. Iterate over it for what is written as it is written, or wait for the `result`.

    Any thread may do so. Whoever waits lends the engine a hand, with steps for all requests. One that nobody waits for
    is worked on all the same, as long as somebody waits for another; `cancel` ends it.
    """

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job

    def __iter__(self) -> Iterator[Delta]:
        """Yield what is written.

        Raises:
            PolyformerError: the request failed; what was written until then has been given out.
        """
        while True:
            try:
                yield self._job.deltas.popleft()
            except IndexError:
                if self.done and not self._job.deltas:
                    break
                self._engine.step()
        if self._job.error is not None:
            raise self._job.error

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._job.reason is not None

    def cancel(self) -> None:
        """Give the request up, at any time; what was written stays."""
        self._job.cancelled = True

    def result(self) -> Answer:
        """Wait for the answer; raises what went wrong."""
        while not self.done:
            self._engine.step()
        if self._job.error is not None:
            raise self._job.error
        return self._job.answer()


@dataclass(eq=False)
class Job:
    """A request as it is worked on.

    Attributes:
        number: counts requests from 0.
        limit: how many tokens may be written.
        mix: the adapters that act on it, from its beginning to its end; None for those that the model is set to.
        slot: where its sequence is held, or None.
        error: why it failed.
    """

    number: int
    request: Request
    limit: int
    mix: Mix | None = None
    slot: int | None = None
    reason: Reason | None = None
    error: PolyformerError | None = None
    cancelled: bool = False
    reused: int = 0
    deltas: deque[Delta] = field(default_factory=deque)
    tokens: list[Scored] = field(default_factory=list)

    def __post_init__(self) -> None:
        request = self.request
        self.text = Written(tuple(request.prompt), [], tuple(request.ends))
        self.chooser = Chooser(request.settings)
        self.stream = None if request.decoder is None else TextStream(request.decoder, request.settings.stop)
        self.deadline = None if request.seconds is None else time.monotonic() + request.seconds

    @property
    def length(self) -> int:
        """How many tokens the text has so far, prompt and answer."""
        return len(self.text.prompt) + len(self.text.ids)

    @property
    def acting(self) -> frozenset[tuple[str, float]] | None:
        """Its adapters as they can be compared and hashed."""
        return None if self.mix is None else frozenset(self.mix.items())

    @property
    def source_length(self) -> int:
        """How many tokens its source has."""
        return len(self.request.source or ())

    def pending(self, held: int, count: int) -> list[int]:
        """Return the next `count` tokens to compute, behind the `held` ones."""
        prompt = len(self.text.prompt)
        if held >= prompt:
            return self.text.ids[held - prompt : held - prompt + count]
        return [*self.text.prompt[held : held + count], *self.text.ids[: max(held + count - prompt, 0)]]

    def write(self, token: Scored) -> None:
        """Take a token that was chosen; it may be the last one."""
        self.tokens.append(token)
        if token.id in self.text.ends:
            self.finish("end")
            return
        self.text.ids.append(token.id)
        piece = "" if self.stream is None else self.stream.push(token.id)
        self.deltas.append(Delta(piece, (token,)))
        if self.stream is not None and self.stream.stopped:
            self.finish("stop")
        elif len(self.text.ids) >= self.limit:
            self.finish("limit")

    def finish(self, reason: Reason) -> None:
        """End it; what is left of its text is given out."""
        if self.stream is not None:
            rest = self.stream.finish()
            if rest:
                self.deltas.append(Delta(rest, ()))
            if self.stream.stopped and reason in ("limit", "end"):
                reason = "stop"
        self.reason = reason

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        told = error if isinstance(error, PolyformerError) else RunError(f"{type(error).__name__}: {error}")
        self.error = told
        self.reason = "failed"

    def answer(self) -> Answer:
        """Return what was written."""
        assert self.reason is not None
        text = "" if self.stream is None else self.stream.text
        total = sum(token.log_probability for token in self.tokens)
        written = self.tokens[: len(self.text.ids)]
        return Answer(list(self.text.ids), text, written, total, self.reason, self.reused)
