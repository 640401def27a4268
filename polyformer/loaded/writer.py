"""A model that writes natively, straight from its file: it needs no PyTorch, and holds its weights once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyformer.errors import SpecError
from polyformer.loaded.writing import chat_rows, continuing, guesser_for, machine_for
from polyformer.native.kinds import Precision, kinds_for
from polyformer.native.machine import NativeModel, NativeState
from polyformer.native.plan import Plan, PlannedWeights, Store
from polyformer.native.runner import NativeRunner

if TYPE_CHECKING:
    from polyformer.data.chat import Message
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.generate import Capacity, Engine, Request, Sampling


@dataclass
class Writer:
    """A decoder in a file, as its plan says, and its tokenizer.

    It does what `Loaded` does of that kind, with the same answers: it continues texts and conversations.

    Attributes:
        path: the file or folder.
        plan: its program, and where its weights lie.
        native: how matrices are held.
        store: the file's tensors.
        text_tokenizer: None where there is none.
    """

    path: Path
    plan: Plan
    native: Precision
    store: Store
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

        guesser = None if guess is None else guesser_for(None, slots, guess, self.plan.context)
        return Engine(self.runner(slots), capacity, guesser)

    def runner(self, slots: int) -> NativeRunner:
        """Return what runs the model."""
        machine, program = machine_for(slots, self.plan.context), self.plan.program
        model = NativeModel(
            program, PlannedWeights(self.plan, self.store), kinds_for(program, self.native), machine.room
        )
        return NativeRunner(NativeState(model, machine))
