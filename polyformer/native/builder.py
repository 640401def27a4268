"""How a program is put together from a spec: the registry of lowerings, and the program as it grows.

A lowering is given a part's spec, its path and the register of its rows; it emits instructions and returns the
register of the result. What has none can't be lowered, and neither can a part that says so: both raise `LoweringError`,
which names the part and the reason, and the model runs in PyTorch.

While it is built, every instruction writes registers of its own. Only in the end are those put in each other's place
whose rows are no longer needed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from polyformer.errors import SpecError
from polyformer.native.program import (
    NONE,
    CacheShape,
    ExpertChoice,
    Instruction,
    Multiply,
    PickRows,
    Program,
    Waves,
    Weight,
    read_by,
    written_by,
)
from polyformer.parts.heads import LMHead
from polyformer.parts.model import Transformer
from polyformer.spec import Spec

S = TypeVar("S", bound=Spec)
Lowering = Callable[[Any, "Builder", str, int], int]

LOWERINGS: dict[type[Spec], Lowering] = {}
"""What lowers each type of part."""


class LoweringError(SpecError):
    """A model that no program can be made of: which part of it, and why."""

    def __init__(self, path: str, part: Spec, why: str) -> None:
        super().__init__(f"{path or 'the model'} ({type(part).__name__}): {why}")
        self.path, self.part, self.why = path, type(part).__name__, why


def lowers(*kinds: type[Spec]) -> Callable[[Lowering], Lowering]:
    """Say that the function below lowers these types of parts."""

    def known(lowering: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(kinds, lowering))
        return lowering

    return known


@dataclass
class Builder:
    """A program as it grows.

    Attributes:
        model: what is lowered.
        width: of each register.
        memory: the register of the encoder's rows, while the decoder's memory is made of them.
        picked: whether only the rows go on whose scores are asked for.
    """

    model: Transformer
    width: list[int] = field(default_factory=list)
    length: int = 0
    vocabulary: int = 0
    memory: int | None = None
    picked: bool = False
    _steps: list[Instruction] = field(default_factory=list)
    _read: list[Instruction] = field(default_factory=list)
    _weights: dict[str, Weight] = field(default_factory=dict)
    _caches: list[CacheShape] = field(default_factory=list)
    _waves: list[Waves] = field(default_factory=list)
    _choices: list[ExpertChoice] = field(default_factory=list)

    def program(self) -> Program:
        """Lower the whole model."""
        model = self.model
        if model.target is None or model.decoder is None:
            raise LoweringError("", model, "only models that write are lowered; this one has no decoder")
        if model.head is None:
            raise LoweringError("", model, "it has no head, so that there are no scores to write by")
        if not isinstance(model.head, LMHead):
            raise LoweringError("head", model.head, "only a head that scores next tokens is lowered")
        if model.encoder is not None:
            self._lower_encoder()
        rows = self.lower(model.target, "target", -1)
        rows = self.lower(model.decoder, "decoder", rows)
        scores = self.lower(model.head, "head", rows)
        self.vocabulary = self.width[scores]
        read, write, widths = _with_few_registers(self._read, self._steps, self.width)
        return Program(
            self.vocabulary,
            tuple(widths),
            tuple(self._weights.values()),
            tuple(self._caches),
            tuple(self._waves),
            tuple(write),
            tuple(read),
            self.length,
            tuple(self._choices),
        )

    def _lower_encoder(self) -> None:
        model = self.model
        assert model.source is not None
        assert model.encoder is not None
        if model.bridge is not None:
            raise LoweringError("bridge", model.bridge, "there is no lowering for it")
        rows = self.lower(model.source, "source", -1)
        self.memory = self.lower(model.encoder, "encoder", rows)
        self._read, self._steps = self._steps, []

    def lower(self, spec: Spec, path: str, x: int) -> int:
        """Lower a part whose rows are in register x; return the register of what it makes of them."""
        lowering = LOWERINGS.get(type(spec))
        if lowering is None:
            raise LoweringError(path, spec, "there is no lowering for it")
        return lowering(spec, self, path, x)

    def fresh(self, width: int) -> int:
        """Return a new register."""
        self.width.append(width)
        return len(self.width) - 1

    def emit(self, one: Instruction) -> int:
        """Add an instruction; return the first register that it writes, or -1."""
        self._steps.append(one)
        return next(iter(written_by(one)), -1)

    def pick(self, x: int) -> int:
        """Let only those rows go on whose scores are asked for, as nothing looks at the others from here on."""
        if self.picked:
            return x
        self.picked = True
        return self.emit(PickRows(self.fresh(self.width[x]), x))

    def read(self, one: Instruction) -> None:
        """Add an instruction to those that make the memory of the encoder's rows."""
        self._read.append(one)

    def multiply(self, x: int, matrix: str, bias: str, outputs: int) -> int:
        """Multiply rows by a matrix, together with the others that take the same rows."""
        return self._multiply(self._steps, x, matrix, bias, outputs)

    def multiply_memory(self, matrix: str, bias: str, outputs: int) -> int:
        """Multiply the encoder's rows."""
        assert self.memory is not None
        return self._multiply(self._read, self.memory, matrix, bias, outputs)

    def _multiply(self, steps: list[Instruction], x: int, matrix: str, bias: str, outputs: int) -> int:
        out = self.fresh(outputs)
        for i, one in enumerate(steps):
            if isinstance(one, Multiply) and one.x == x:  # each register is written once, so that this is early enough
                matrices, biases = (*one.matrices, matrix), (*one.biases, bias)
                steps[i] = Multiply((*one.outs, out), x, matrices, biases)
                return out
        steps.append(Multiply((out,), x, (matrix,), (bias,)))
        return out

    def weight(self, path: str, *shape: int, made: Spec | None = None) -> str:
        """Note a tensor; return the path under which it is held, which differs where it is tied to another."""
        owners = {tie.tied: tie.to for tie in self.model.ties}
        path = owners.get(path, path)
        known = self._weights.setdefault(path, Weight(path, tuple(shape), made))
        if known.shape != tuple(shape):
            raise SpecError(f"{path} is used as {list(known.shape)} and as {list(shape)}")
        return path

    def optional(self, there: bool, path: str, *shape: int) -> str:
        """Note a tensor where there is one."""
        return self.weight(path, *shape) if there else NONE

    def cache(self, shape: CacheShape) -> int:
        """Return a new cache. The encoder's layers, which come one after the other, take turns with one."""
        if self.model.encoder is not None and self.memory is None and shape in self._caches:
            return self._caches.index(shape)
        self._caches.append(shape)
        return len(self._caches) - 1

    def waves(self, waves: Waves) -> int:
        """Return the number of rotary angles; layers with the same share it."""
        if waves not in self._waves:
            self._waves.append(waves)
        return self._waves.index(waves)

    def choice(self, choice: ExpertChoice) -> int:
        """Return a new choice of experts."""
        self._choices.append(choice)
        return len(self._choices) - 1

    def limit(self, length: int | None) -> None:
        """Say that there are only so many places."""
        if length is not None:
            self.length = min(self.length or length, length)


@dataclass
class _Pool:
    """Registers of each width that hold nothing now."""

    widths: list[int] = field(default_factory=list)
    free: dict[int, list[int]] = field(default_factory=dict)

    def take(self, width: int) -> int:
        if self.free.get(width):  # the first, so that layers which are alike use the same
            return heapq.heappop(self.free[width])
        self.widths.append(width)
        return len(self.widths) - 1

    def give(self, number: int) -> None:
        heapq.heappush(self.free.setdefault(self.widths[number], []), number)


def _with_few_registers(
    read: list[Instruction], write: list[Instruction], widths: list[int]
) -> tuple[list[Instruction], list[Instruction], list[int]]:
    """Put registers in each other's place; what encoder and decoder use never lives at once."""
    pool = _Pool()
    return _renumbered(read, widths, pool), _renumbered(write, widths, pool), pool.widths


def _renumbered(steps: list[Instruction], widths: list[int], pool: _Pool) -> list[Instruction]:
    last: dict[int, int] = {}
    for i, one in enumerate(steps):
        last |= dict.fromkeys((*read_by(one), *written_by(one)), i)
    place: dict[int, int] = {}
    found = []
    for i, one in enumerate(steps):
        dying = [number for number in dict.fromkeys(read_by(one)) if last[number] == i]
        renamed = {name: _renamed(getattr(one, name), place) for name in one.reads}
        if one.in_place:
            _release(dying, place, pool)
        for number in written_by(one):
            place[number] = pool.take(widths[number])
        renamed |= {name: _renamed(getattr(one, name), place) for name in one.writes}
        if not one.in_place:
            _release(dying, place, pool)
        _release((number for number in written_by(one) if last[number] == i and i + 1 < len(steps)), place, pool)
        found.append(one.replace(**renamed))
    for number in written_by(steps[-1]) if steps else ():
        pool.give(place[number])
    return found


def _renamed(value: int | tuple[int, ...], place: dict[int, int]) -> int | tuple[int, ...]:
    return tuple(place[number] for number in value) if isinstance(value, tuple) else place[value]


def _release(numbers: Iterable[int], place: dict[int, int], pool: _Pool) -> None:
    for number in numbers:
        pool.give(place[number])
