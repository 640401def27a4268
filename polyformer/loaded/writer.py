"""A model that writes natively, straight from its file: it needs no PyTorch, and holds its weights once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyformer.errors import RunError, SpecError
from polyformer.loaded.writing import chat_rows, continuing, guesser_for, machine_for
from polyformer.native.kinds import Precision, kinds_for
from polyformer.native.machine import Given, NativeModel, NativeState
from polyformer.native.plan import Plan, PlannedWeights, Store
from polyformer.native.runner import NativeRunner

if TYPE_CHECKING:
    from polyformer.data.chat import Message
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.generate import Capacity, Engine, Request, Sampling


class Packing:
    """Packs a plan's weights in a thread of its own, while the tokenizer is read: the native side needs no Python."""

    def __init__(self, plan: Plan, store: Store, held: Precision) -> None:
        """Begin; `held` says how matrices are held."""
        self.plan, self.held = plan, held
        self._give, self._stopped = PlannedWeights(plan, store), False
        self._made: NativeModel | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._pack, name="packing")
        self._thread.start()

    def done(self) -> NativeModel:
        """Wait, and return the model.

        Raises:
            RunError: the native side refuses a weight.
            WeightsError: the file can't be read any more.
        """
        try:
            self._thread.join()
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made

    def stop(self) -> None:
        """Give it up, as soon as the weight at hand is packed."""
        self._stopped = True

    def _pack(self) -> None:
        try:
            machine, program = machine_for(1, self.plan.context), self.plan.program
            self._made = NativeModel(program, self._given, kinds_for(program, self.held), machine.room)
        except Exception as error:  # which `done` raises
            self._error = error

    def _given(self, path: str) -> Given:
        if self._stopped:
            raise RunError("packing was given up")
        return self._give(path)


@dataclass
class Writer:
    """A decoder in a file, as its plan says, and its tokenizer.

    It does what `Loaded` does of that kind, with the same answers: it continues texts and conversations.

    Attributes:
        path: the file or folder.
        plan: its program, and where its weights lie.
        packing: its weights, as they are made ready.
        text_tokenizer: None where there is none.
    """

    path: Path
    plan: Plan
    packing: Packing
    text_tokenizer: TextTokenizer | None

    reads_source = False

    @property
    def texts(self) -> TextTokenizer:
        """The tokenizer; raises `SpecError` if there is none."""
        if self.text_tokenizer is None:
            raise SpecError(f"the model in {self.path} came without a tokenizer for single texts; give it ids")
        return self.text_tokenizer

    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, by the generation settings or else by the tokenizer."""
        if self.plan.ends is not None:
            return self.plan.ends
        end = None if self.text_tokenizer is None else self.text_tokenizer.eos_id
        return () if end is None else (end,)

    def requests(self, texts: Sequence[str], settings: Sampling) -> list[Request]:
        """Return what an engine is asked to continue texts."""
        return continuing(self, self.texts.encode_batch(list(texts)), settings)

    def chat_requests(self, conversations: Sequence[Sequence[Message]], settings: Sampling) -> list[Request]:
        """Return what an engine is asked to answer conversations by the model's chat template."""
        return continuing(self, chat_rows(self.texts, conversations), settings)

    def engine(self, slots: int = 16, capacity: Capacity | None = None, guess: str | None = None) -> Engine:
        """Return an engine that answers requests, many at once; see `Loaded.engine`."""
        from polyformer.generate import Engine

        guesser = None if guess is None else guesser_for(None, slots, guess)
        return Engine(self.runner(slots), capacity, guesser)

    def runner(self, slots: int) -> NativeRunner:
        """Return what runs the model; waits for its weights."""
        return NativeRunner(NativeState(self.packing.done(), machine_for(slots, self.plan.context)))

    @property
    def native(self) -> Precision:
        """How matrices are held."""
        return self.packing.held
