"""What the engine asks of whatever runs a model: slots that hold one sequence each, and steps over many of them.

Decoding, prefill in chunks, and both at once are the same call: a step takes rows, each of which knows its sequence
and its place in it. Shape letters: R rows, W rows whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from polyformer.generate.scores import Scores


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

    def step(self, rows: Rows, wanted: Sequence[int]) -> Scores:
        """Run the rows, hold what later ones need of them, and return the scores [W, V] of those wanted, in float32.

        Args:
            wanted: indices into `rows`, in order.
        """

    def read(self, slot: int, source: Sequence[int]) -> None:
        """Run the encoder on a source, whose output the slot's rows will look at."""

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""

    def earliest(self, slot: int) -> int:
        """Return the least length above 0 that a slot can be cut back to: its own where states are recurrent."""

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
