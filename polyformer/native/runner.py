"""Runs a model natively for whatever asks for slots and steps: the engine, or a loop of one's own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from polyformer.errors import RunError, SpecError
from polyformer.native.kinds import Precision, kinds_for
from polyformer.native.machine import RETRACTS, Machine, NativeModel, NativeState
from polyformer.native.program import Program, TakeTokens

if TYPE_CHECKING:
    from polyformer.parts.flow import Mix
    from polyformer.parts.model import TransformerPart


class RowsOfStep(Protocol):
    """The tokens of a step as three lists; the rows of a slot are in order."""

    @property
    def slots(self) -> Sequence[int]:
        """The slot of each."""

    @property
    def positions(self) -> Sequence[int]:
        """The place of each in its slot."""

    @property
    def ids(self) -> Sequence[int]:
        """The token itself."""


class NativeRunner:
    """A model on the native side, and the sequences in its slots.

    A step's scores do not depend, bit for bit, on what else is in it, nor on how a text is cut into steps. A call that
    raises has changed nothing that counts.

    Attributes:
        slots: how many sequences it can hold.
        positions, source_positions: the longest sequence, and the longest text that is read.
        vocabulary, source_vocabulary: how many tokens there are of either; None where no text is read.
        reads_source: whether a slot must be given a text to read first.
        retracts: how many of the last tokens a slot can always be cut back by.
        version: names the weights.
        adapters: none: what adapters the model has act on every text, as its spec says.
    """

    retracts = RETRACTS
    adapters: tuple[str, ...] = ()

    def __init__(self, state: NativeState) -> None:
        program, machine = state.model.program, state.machine
        self.state, self.slots = state, machine.slots
        self.positions: int | None = min(machine.room, program.length or machine.room)
        self.vocabulary, self.reads_source = program.vocabulary, bool(program.read)
        self.source_positions: int | None = self.positions if self.reads_source else None
        self.source_vocabulary = _tokens_read(program)
        self.version: Hashable = 0

    def use(self, slot: int, mix: Mix | None) -> None:
        """Refuse a mix of adapters for one slot; raises `SpecError`."""
        if mix is not None:
            raise SpecError("a model that runs natively can't change its adapters between texts; load it in PyTorch")

    def step(self, rows: RowsOfStep, wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        """Run the rows, hold what later ones need of them, and return the scores [W, V] of those wanted.

        Raises:
            RunError: a slot or a token that isn't there, a gap before a token, or a place beyond the room.
        """
        return self.state.step(rows.ids, rows.slots, rows.positions, wanted)

    def best(
        self, rows: RowsOfStep, wanted: Sequence[int], count: int, forbidden: Sequence[int]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Do what `step` does, but return the likeliest next tokens: log-probabilities and ids [W, count], in order."""
        return self.state.best(rows.ids, rows.slots, rows.positions, wanted, min(count, self.vocabulary), forbidden)

    def read(self, sources: Mapping[int, Sequence[int]]) -> None:
        """Run the encoder on the texts of slots, at which their rows will look."""
        self.state.read_all(sources)

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return self.state.length(slot)

    def earliest(self, slot: int) -> int:
        """Return the least length above 0 that a slot can be cut back to; what lies before windows is forgotten."""
        return self.state.earliest(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.state.truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`, which stays."""
        self.state.copy(source, target, length)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds, its text too, and give its memory back."""
        self.state.clear(slot)

    def bytes_for(self, tokens: int, source: int = 0) -> int:
        """Return how much memory a slot takes that holds so many tokens and a text of so many."""
        return self.state.bytes_for(tokens, source)

    @property
    def bytes(self) -> int:
        """How much memory all slots take now."""
        return self.state.bytes


def runner(
    model: TransformerPart | Path | str,
    weights: Precision = "as stored",
    machine: Machine | None = None,
    blocks: int | None = None,
) -> NativeRunner:
    """Return what runs a model natively.

    Args:
        model: a model in memory, or a GGUF file, whose blocks are taken as they are.
        blocks: of a file, how many of the decoder's blocks run, the first ones; None for all.
        weights: how matrices are held; "as stored" keeps the codes of a GGUF file and makes floats of all else.
    Raises:
        LoweringError: the model has a part that no program can be made of; it runs in PyTorch.
        RunError: the native side was not compiled, or refuses what it is given.
        WeightsError, SpecError: a file that can't be read.
    """
    machine = machine or Machine()
    return NativeRunner(NativeState(packed(model, weights, machine, blocks), machine))


def packed(
    model: TransformerPart | Path | str, weights: Precision, machine: Machine, blocks: int | None = None
) -> NativeModel:
    """Return a model's program and weights, ready for any number of runners; see `runner`."""
    if isinstance(model, Path | str):
        return _of_file(Path(model), weights, machine, blocks)
    from polyformer.native.given import from_tensors
    from polyformer.native.lowering import lower

    program, tensors = lower(model.spec), dict(model.named_parameters()) | dict(model.named_buffers())
    given = from_tensors(program, tensors, machine.room)
    return NativeModel(program, given, kinds_for(program, weights), machine.room)


def _of_file(path: Path, weights: Precision, machine: Machine, blocks: int | None) -> NativeModel:
    if path.is_dir():
        raise RunError(f"{path} is a folder; load it first, and give its model")
    from polyformer.families import read_family
    from polyformer.families.gguf import gguf_config
    from polyformer.native.given import from_gguf
    from polyformer.native.lowering import lower
    from polyformer.parts import Stack, Transformer
    from polyformer.weights.gguf import read_gguf

    file = read_gguf(path)
    config = gguf_config(file)
    family = read_family(config, str(path))
    spec = family.spec()
    if blocks is not None and isinstance(spec, Transformer) and isinstance(spec.decoder, Stack):
        spec = spec.replace(decoder=spec.decoder.replace(blocks=spec.decoder.blocks[:blocks]))
    program = lower(spec)
    given = from_gguf(program, file, family, config, machine.room)
    return NativeModel(program, given, kinds_for(program, weights), machine.room)


def _tokens_read(program: Program) -> int | None:
    tables = {one.path: one.shape[0] for one in program.weights}
    return next((tables[one.table] for one in program.read if isinstance(one, TakeTokens)), None)
