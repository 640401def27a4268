"""What the engine asks of whatever runs a model: slots that hold one sequence each, and steps over many of them.

Decoding, prefill in chunks, and both at once are the same call: a step takes rows, each of which knows its sequence
and its place in it. Shape letters: R rows, W rows whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from polyformer.errors import SpecError

if TYPE_CHECKING:
    from polyformer.generate.scores import Ids, Scores
    from polyformer.parts.flow import Mix


@dataclass
class Counts:
    """What has been done so far.

    Attributes:
        steps, rows: calls of the model, and rows in them.
        written: tokens chosen; by a search, those of the best hypotheses.
        reused: tokens of prompts that were found in the cache.
        preempted: how often a text had to give its slot up.
    """

    steps: int = 0
    rows: int = 0
    written: int = 0
    reused: int = 0
    preempted: int = 0

    def note(self, rows: int) -> None:
        """Count a step."""
        self.steps += 1
        self.rows += rows


class Rows(NamedTuple):
    """The tokens of one step, R of them, as three lists.

    The rows of a slot stand next to each other and in order; the first one's position is the slot's length, and each
    further one's is one more.
    """

    slots: list[int]
    positions: list[int]
    ids: list[int]


class Runner(Protocol):
    """Runs a model on the sequences in its slots. What it is asked is in order: the engine looks after that.

    A call that raises has changed nothing that counts: the slots hold what they held before.
    """

    @property
    def slots(self) -> int:
        """How many sequences it can hold."""

    @property
    def positions(self) -> int | None:
        """The longest sequence, or None where there is no bound."""

    @property
    def vocabulary(self) -> int:
        """V."""

    @property
    def source_positions(self) -> int | None:
        """The longest source, for encoder–decoders; None where there is no bound."""

    @property
    def source_vocabulary(self) -> int | None:
        """How many tokens sources are made of; None where there are no sources."""

    @property
    def reads_source(self) -> bool:
        """Whether it is an encoder–decoder, so that a slot must be given a source before its first row."""

    @property
    def version(self) -> Hashable:
        """Names the weights. What was computed under another one is never used again."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that a slot can be told to use; none where the model has none, or can't change between texts."""

    def use(self, slot: int, mix: Mix | None) -> None:
        """Let these adapters act on what an empty slot is going to hold; None is those that the model is set to."""

    def step(self, rows: Rows, wanted: Sequence[int]) -> Scores:
        """Run the rows, hold what later ones need of them, and return the scores [W, V] of those wanted, in float32.

        Args:
            wanted: indices into `rows`, in order.
        """

    def best(self, rows: Rows, wanted: Sequence[int], count: int, forbidden: Sequence[int]) -> tuple[Scores, Ids]:
        """Do what `step` does, but return only the likeliest next tokens of the rows wanted, best first.

        Args:
            forbidden: ids that come out as impossible, though they keep their share of the probability.
        Returns:
            Log-probabilities [W, count], and ids [W, count]; of equally likely ones, lower ids come first.
        """

    def read(self, sources: Mapping[int, Sequence[int]]) -> None:
        """Run the encoder on the sources of slots, whose output their rows will look at."""

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""

    def earliest(self, slot: int) -> int:
        """Return the least length above 0 that a slot can be cut back to: its own where states are recurrent.

        What attends to a window only has forgotten the keys that a much shorter text would look at.
        """

    @property
    def retracts(self) -> int:
        """How many of its last tokens a slot can always be cut back by; 0 where states are recurrent."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot; `length` is 0, or at least `earliest(slot)`."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`, which stays; `length` as for `truncate`."""

    def clear(self, slot: int) -> None:
        """Forget what a slot holds, its source too, and give its memory back."""

    def bytes_for(self, tokens: int, source: int = 0) -> int:
        """Return how much memory a slot takes that holds so many tokens and a source of so many."""

    @property
    def bytes(self) -> int:
        """How much memory all slots take now."""


def refuse(runner: Runner, prompt: Sequence[int], source: Sequence[int] | None) -> None:
    """Raise `SpecError` for what a runner can't go on from: a prompt that is empty, too long, or of unknown ids."""
    if not prompt or (source is not None and not source):
        raise SpecError("each prompt must have at least one token")
    if runner.reads_source != (source is not None):
        told = "needs a source for its encoder" if runner.reads_source else "has no encoder that reads a source"
        raise SpecError(f"this model {told}")
    _refuse_ids(prompt, runner.positions, runner.vocabulary)
    if source is not None:
        _refuse_ids(source, runner.source_positions, runner.source_vocabulary)


def _refuse_ids(ids: Sequence[int], positions: int | None, vocabulary: int | None) -> None:
    if positions is not None and len(ids) > positions:
        raise SpecError(f"a prompt of {len(ids)} tokens is longer than the model's {positions} positions; shorten it")
    if vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise SpecError(f"a prompt has an id outside of the vocabulary of {vocabulary:,}")
