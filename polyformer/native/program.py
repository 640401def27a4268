"""A program: what a model does for a step's rows, as a flat list of instructions over numbered registers.

A step takes any number of tokens, each with the slot of the sequence that it belongs to and its place in it, so that
many sequences at once, a long prompt in pieces, and one token after the other are all the same program. A register
holds a row of numbers for each of them. A program holds no weights but their names, so that it can be printed, written
to a file, and run with weights of any precision.

Shape letters: N rows of the step, H heads, G key/value heads, E head width, R the rotated part of a head, X experts,
C experts chosen for a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from polyformer.spec import Record, Spec, field_types, repetitions

Function = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "gelu_quick", "silu", "tanh", "identity"]
NONE = ""
"""In place of the name of a weight: there is none."""


class Instruction(Record, abstract=True):
    """One step of a program.

    Attributes:
        name: what it is called in print.
        reads, writes: the fields that hold registers.
        weights: the fields that hold names of weights.
        in_place: whether what it writes may take the place of what it reads.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("x",)
    writes: ClassVar[tuple[str, ...]] = ("out",)
    weights: ClassVar[tuple[str, ...]] = ()
    in_place: ClassVar[bool] = True


class TakeTokens(Instruction):
    """out = scale · table[token]."""

    name: ClassVar[str] = "tokens"
    reads: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ("table",)

    out: int
    table: str
    scale: float = 1.0


class AddPlaces(Instruction):
    """out = x + table[place + offset]."""

    name: ClassVar[str] = "places"
    weights: ClassVar[tuple[str, ...]] = ("table",)

    out: int
    x: int
    table: str
    offset: int = 0


class NormRows(Instruction):
    """out = (x - mean) / √(variance + eps) · (gain + offset) + bias over each `width` elements of a row.

    The `kind` "rms" leaves out the mean: x / √(mean(x²) + eps).
    """

    name: ClassVar[str] = "norm"
    weights: ClassVar[tuple[str, ...]] = ("gain", "bias")

    out: int
    x: int
    kind: Literal["layer", "rms"]
    width: int
    eps: float
    gain: str = NONE
    bias: str = NONE
    offset: float = 0.0


class Multiply(Instruction):
    """outs[i] = x weights[i]ᵀ + biases[i]: all matrices that take the same rows, such as q, k and v, at once."""

    name: ClassVar[str] = "multiply"
    writes: ClassVar[tuple[str, ...]] = ("outs",)
    weights: ClassVar[tuple[str, ...]] = ("matrices", "biases")
    in_place: ClassVar[bool] = False

    outs: tuple[int, ...]
    x: int
    matrices: tuple[str, ...]
    biases: tuple[str, ...]


class Rotate(Instruction):
    """The first R elements of each head turned by place · rate (`Program.waves`), in pairs of either layout."""

    name: ClassVar[str] = "rotate"

    out: int
    x: int
    waves: int
    heads: int
    layout: Literal["halves", "interleaved"]


class Remember(Instruction):
    """Keys and values [G · E] written into a cache, at each row's slot and place."""

    name: ClassVar[str] = "remember"
    reads: ClassVar[tuple[str, ...]] = ("k", "v")
    writes: ClassVar[tuple[str, ...]] = ()

    k: int
    v: int
    cache: int


class Slopes(Record):
    """ALiBi's score bias: -scale · slope · distance, one slope to a head; "bfloat16" adds rounded slope · place."""

    slopes: tuple[float, ...]
    scale: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"


class DistanceBuckets(Record):
    """T5's score bias: a trained value for each bucket of distances and head, `table` [buckets, heads]."""

    table: str
    count: int
    distance: int
    two_sided: bool


class Look(Instruction):
    """Attention: out = softmax(cap · tanh(scale · q kᵀ / cap) + bias) v over keys and values of a cache.

    Keys are those of the row's own slot: at its own place and before it ("causal"), no more than `window` of them if
    that is not 0, or all that the slot holds ("all"). `cap` 0 is no cap.
    """

    name: ClassVar[str] = "look"
    reads: ClassVar[tuple[str, ...]] = ("q",)
    in_place: ClassVar[bool] = False

    out: int
    q: int
    cache: int
    heads: int
    scale: float
    rule: Literal["causal", "all"] = "causal"
    window: int = 0
    cap: float = 0.0
    bias: Slopes | DistanceBuckets | None = None


class ChooseExperts(Instruction):
    """out [C] = the weights of the C experts with the highest scores x [X], which are noted as a choice by its number.

    The weights are probabilities among "all" experts, or among the "chosen" ones. Of a step's rows of one slot, an
    expert takes the first `capacity`, if that is not 0; the weight of what it doesn't take is 0.
    """

    name: ClassVar[str] = "choose"
    in_place: ClassVar[bool] = False

    out: int
    x: int
    choice: int
    among: Literal["all", "chosen"] = "chosen"
    capacity: int = 0


class MultiplyChosen(Instruction):
    """outs[i] = each chosen expert's x weightᵀ + bias, side by side, in the order of the choice.

    x is one row for all of them, or what such an instruction made: one behind the other for each of them.
    `matrices` and `biases` are those of all experts for the first of `outs`, then those for the next.
    """

    name: ClassVar[str] = "multiply chosen"
    writes: ClassVar[tuple[str, ...]] = ("outs",)
    weights: ClassVar[tuple[str, ...]] = ("matrices", "biases")
    in_place: ClassVar[bool] = False

    outs: tuple[int, ...]
    x: int
    choice: int
    matrices: tuple[str, ...]
    biases: tuple[str, ...]


class BlendChosen(Instruction):
    """out = the sum of what the chosen experts made, x, each times its weight of `shares` [C]."""

    name: ClassVar[str] = "blend"
    reads: ClassVar[tuple[str, ...]] = ("x", "shares")
    in_place: ClassVar[bool] = False

    out: int
    x: int
    shares: int
    choice: int


class DampRows(Instruction):
    """out = x / (1 + exp(-gate)), where `gate` is one number for each row."""

    name: ClassVar[str] = "damp"
    reads: ClassVar[tuple[str, ...]] = ("x", "gate")
    in_place: ClassVar[bool] = False

    out: int
    x: int
    gate: int


class Activated(Instruction):
    """out = function(x)."""

    name: ClassVar[str] = "apply"

    out: int
    x: int
    function: Function


class ActivatedGate(Instruction):
    """out = function(gate) · up."""

    name: ClassVar[str] = "gate"
    reads: ClassVar[tuple[str, ...]] = ("gate", "up")

    out: int
    gate: int
    up: int
    function: Function


class AddRows(Instruction):
    """out = x + y."""

    name: ClassVar[str] = "add"
    reads: ClassVar[tuple[str, ...]] = ("x", "y")

    out: int
    x: int
    y: int


class ScaleRows(Instruction):
    """out = x · by."""

    name: ClassVar[str] = "scale"

    out: int
    x: int
    by: float


class ClipRows(Instruction):
    """out = x, kept within ± limit."""

    name: ClassVar[str] = "clip"

    out: int
    x: int
    limit: float


class CapRows(Instruction):
    """out = cap · tanh(x / cap)."""

    name: ClassVar[str] = "cap"

    out: int
    x: int
    cap: float


class PickRows(Instruction):
    """Of all rows only those go on whose scores are asked for; x must not be read any more."""

    name: ClassVar[str] = "pick"
    in_place: ClassVar[bool] = False

    out: int
    x: int


class CacheShape(Record):
    """What a cache holds of each token: keys and values of `groups` heads, each `width` wide.

    Those of a "text" are of the sequence that is written, those of a "memory" of the one that was read.
    """

    groups: int
    width: int
    holds: Literal["text", "memory"] = "text"


class ExpertChoice(Record):
    """A choice that is made for each row: C of X experts."""

    experts: int
    chosen: int


class Waves(Record):
    """The angles a place of rotated pairs [R / 2], and the factor on what was turned."""

    rates: tuple[float, ...]
    strength: float = 1.0


class Weight(Record):
    """A tensor that a program reads: its path in the model, its shape, and, where it is computed, what makes it."""

    path: str
    shape: tuple[int, ...]
    made: Spec | None = None


class Program(Record):
    """What a model does for a step's rows.

    Attributes:
        registers: the width of each.
        weights: all tensors, each once.
        caches, waves, choices: what instructions name by number.
        write: the instructions by which tokens become scores: their last register.
        read: those which come first where there is an encoder: they fill the caches of the kind "memory".
        length: the number of places there are; 0 for any number.
    """

    vocabulary: int
    registers: tuple[int, ...]
    weights: tuple[Weight, ...]
    caches: tuple[CacheShape, ...]
    waves: tuple[Waves, ...]
    write: tuple[Instruction, ...]
    read: tuple[Instruction, ...] = ()
    length: int = 0
    choices: tuple[ExpertChoice, ...] = ()

    @property
    def scores(self) -> int:
        """The register that holds the scores in the end."""
        return written_by(self.write[-1])[0]

    def told(self) -> str:
        """Return the program for people to read; equal runs of instructions, as of layers, are told once."""
        held = [f"{len(self.weights)} weights", f"{len(self.registers)} registers", f"{len(self.caches)} caches"]
        lines = [", ".join(held)]
        for title, part in (("read", self.read), ("write", self.write)):
            if part:
                lines += [f"{title}:", *_folded([line_of(one) for one in part])]
        return "\n".join(lines)


def read_by(one: Instruction) -> tuple[int, ...]:
    """Return the registers that an instruction reads."""
    return tuple(number for name in one.reads for number in _numbers(getattr(one, name)))


def written_by(one: Instruction) -> tuple[int, ...]:
    """Return the registers that an instruction writes."""
    return tuple(number for name in one.writes for number in _numbers(getattr(one, name)))


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def line_of(one: Instruction) -> str:
    """Write an instruction on a line: `r3 = norm r1 kind=rms width=576 …`."""
    outs = ", ".join(f"r{number}" for number in written_by(one))
    ins = " ".join(f"r{number}" for number in read_by(one))
    told = [f"{outs} = {one.name}" if outs else one.name, ins] if ins else [f"{outs} = {one.name}"]
    if isinstance(one, Multiply):
        pairs = zip(one.matrices, one.biases, strict=True)
        return " ".join([*told, *(f"{matrix} + {bias}" if bias else matrix for matrix, bias in pairs)])
    if isinstance(one, MultiplyChosen):
        firsts = one.matrices[:: len(one.matrices) // len(one.outs)]
        return " ".join([*told, f"choice={one.choice}", *firsts, "and of all other experts"])
    data = one.to_data()
    told += [f"{key}={_brief(data[key])}" for key in field_types(type(one)) if key in data and key not in _places(one)]
    return " ".join(told)


def _places(one: Instruction) -> tuple[str, ...]:
    return one.reads + one.writes


def _brief(value: object) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{k}={_brief(v)}" for k, v in value.items() if k != "type")
        return f"{value.get('type', '')}({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value[:3]))}{', …' * (len(value) > 3)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_COUNTED = re.compile(r"(?<=blocks\.)\d+|(?<=cache=)\d+|(?<=choice=)\d+")


def _folded(lines: list[str]) -> Iterator[str]:
    """Yield lines; of a run of blocks that differ only in their numbers, the first, and how many there are."""
    alike = tuple(_COUNTED.sub("#", line) for line in lines)
    for start, period, count in repetitions(alike):
        if count > 1 and period > 1:
            yield f"  {count} times, here the first:"
            yield from (f"    {line}" for line in lines[start : start + period])
        else:
            yield from (f"  {line}" for line in lines[start : start + period * count])
