"""A program as whole numbers in a row, the form in which the native side reads it; real numbers are their bits."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from polyformer.native import program as ir

MAGIC = 0x504F4C59
FUNCTIONS = ("relu", "relu_squared", "gelu", "gelu_tanh", "gelu_quick", "silu", "tanh", "identity")


def words_of(program: ir.Program, room: int) -> list[int]:
    """Return a program's words; tables that are computed get so many rows as there is `room` for tokens."""
    numbers = {one.path: i for i, one in enumerate(program.weights)}
    packed = packed_weights(program)
    words = [MAGIC, program.vocabulary, program.length, *_counted(program.registers)]
    words.append(len(program.caches))
    for cache in program.caches:
        words += [cache.groups, cache.width, int(cache.holds == "memory")]
    words.append(len(program.waves))
    for waves in program.waves:
        words += [_bits(waves.strength), *_counted(map(_bits, waves.rates))]
    words.append(len(program.choices))
    for choice in program.choices:
        words += [choice.experts, choice.chosen]
    words.append(len(program.weights))
    for one in program.weights:
        words += [*shape_of(one, room), int(one.path in packed)]
    for part in (program.read, program.write):
        words.append(len(part))
        for instruction in part:
            code, encode = CODES[type(instruction)]
            words += [code, *encode(instruction, numbers)]
    return words


def packed_weights(program: ir.Program) -> set[str]:
    """Return the paths of matrices and tables of vectors; all others are lists of plain numbers."""
    found: set[str] = set()
    for one in (*program.read, *program.write):
        if isinstance(one, ir.Multiply | ir.MultiplyChosen):
            found.update(one.matrices)
        elif isinstance(one, ir.TakeTokens | ir.AddPlaces):
            found.add(one.table)
    return found


def shape_of(one: ir.Weight, room: int) -> tuple[int, int]:
    """Return rows and columns; a vector has one row."""
    rows, columns = one.shape if len(one.shape) == 2 else (1, *one.shape)
    return rows or room, columns


def _bits(number: float) -> int:
    found: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return found


def _counted(numbers: Any) -> Iterator[int]:
    listed = list(numbers)
    yield len(listed)
    yield from listed


Numbers = dict[str, int]


def _number(numbers: Numbers, path: str) -> int:
    return numbers[path] if path else -1


def _take(one: ir.TakeTokens, numbers: Numbers) -> list[int]:
    return [numbers[one.table], one.out, _bits(one.scale)]


def _places(one: ir.AddPlaces, numbers: Numbers) -> list[int]:
    return [one.x, one.out, numbers[one.table], one.offset]


def _norm(one: ir.NormRows, numbers: Numbers) -> list[int]:
    kind, vectors = ("layer", "rms").index(one.kind), [_number(numbers, path) for path in (one.gain, one.bias)]
    return [one.x, one.out, kind, one.width, _bits(one.eps), _bits(one.offset), *vectors]


def _multiply(one: ir.Multiply, numbers: Numbers) -> list[int]:
    words = [one.x, len(one.outs)]
    for out, matrix, bias in zip(one.outs, one.matrices, one.biases, strict=True):
        words += [numbers[matrix], _number(numbers, bias), out]
    return words


def _choose(one: ir.ChooseExperts, numbers: Numbers) -> list[int]:
    return [one.x, one.out, one.choice, ("all", "chosen").index(one.among), one.capacity]


def _multiply_chosen(one: ir.MultiplyChosen, numbers: Numbers) -> list[int]:
    words, experts = [one.x, one.choice, len(one.outs)], len(one.matrices) // len(one.outs)
    for i, out in enumerate(one.outs):
        own = slice(i * experts, (i + 1) * experts)
        words.append(out)
        for matrix, bias in zip(one.matrices[own], one.biases[own], strict=True):
            words += [numbers[matrix], _number(numbers, bias)]
    return words


def _blend(one: ir.BlendChosen, numbers: Numbers) -> list[int]:
    return [one.x, one.shares, one.out, one.choice]


def _damp(one: ir.DampRows, numbers: Numbers) -> list[int]:
    return [one.x, one.gate, one.out]


def _rotate(one: ir.Rotate, numbers: Numbers) -> list[int]:
    return [one.x, one.out, one.waves, one.heads, ("halves", "interleaved").index(one.layout)]


def _remember(one: ir.Remember, numbers: Numbers) -> list[int]:
    return [one.k, one.v, one.cache]


def _look(one: ir.Look, numbers: Numbers) -> list[int]:
    words = [one.q, one.cache, one.heads, one.out, _bits(one.scale), ("causal", "all").index(one.rule), one.window]
    words.append(_bits(one.cap))
    bias = one.bias
    if bias is None:
        return [*words, 0]
    if isinstance(bias, ir.Slopes):
        kind = ("float32", "bfloat16").index(bias.precision) + 1
        return [*words, kind, _bits(bias.scale), *map(_bits, bias.slopes)]
    return [*words, 3, numbers[bias.table], bias.count, bias.distance, int(bias.two_sided)]


def _apply(one: ir.Activated, numbers: Numbers) -> list[int]:
    return [one.x, one.out, FUNCTIONS.index(one.function)]


def _gate(one: ir.ActivatedGate, numbers: Numbers) -> list[int]:
    return [one.gate, one.up, one.out, FUNCTIONS.index(one.function)]


def _add(one: ir.AddRows, numbers: Numbers) -> list[int]:
    return [one.x, one.y, one.out]


def _scale(one: ir.ScaleRows, numbers: Numbers) -> list[int]:
    return [one.x, one.out, _bits(one.by)]


def _clip(one: ir.ClipRows, numbers: Numbers) -> list[int]:
    return [one.x, one.out, _bits(one.limit)]


def _cap(one: ir.CapRows, numbers: Numbers) -> list[int]:
    return [one.x, one.out, _bits(one.cap)]


def _pick(one: ir.PickRows, numbers: Numbers) -> list[int]:
    return [one.x, one.out]


CODES: dict[type[ir.Instruction], tuple[int, Callable[[Any, Numbers], list[int]]]] = {
    ir.TakeTokens: (0, _take),
    ir.AddPlaces: (1, _places),
    ir.NormRows: (2, _norm),
    ir.Multiply: (3, _multiply),
    ir.Rotate: (4, _rotate),
    ir.Remember: (5, _remember),
    ir.Look: (6, _look),
    ir.Activated: (7, _apply),
    ir.ActivatedGate: (8, _gate),
    ir.AddRows: (9, _add),
    ir.ScaleRows: (10, _scale),
    ir.ClipRows: (11, _clip),
    ir.CapRows: (12, _cap),
    ir.PickRows: (13, _pick),
    ir.ChooseExperts: (14, _choose),
    ir.MultiplyChosen: (15, _multiply_chosen),
    ir.BlendChosen: (16, _blend),
    ir.DampRows: (17, _damp),
}
"""The number of each instruction, and what follows it."""
