"""Where a program's weights come from: a model in memory, or the blocks of a GGUF file as they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyformer.errors import RunError, WeightsError
from polyformer.families import Family
from polyformer.families.gguf import gguf_names
from polyformer.native.machine import OWN_KINDS, SOURCES, Given
from polyformer.native.plan import Lines, Store, given_lines
from polyformer.native.program import Program
from polyformer.parts.positions import Sinusoidal, SinusoidalPart
from polyformer.weights.files import TensorMap
from polyformer.weights.gguf import GgufFile
from polyformer.weights.names import Names

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Giver = Callable[[str], Given]
BY: tuple[Lines, Lines] = ("rows", "columns")


def from_tensors(program: Program, tensors: Mapping[str, Tensor], room: int) -> Giver:
    """Return what gives a program its weights from tensors by path; those that are computed are made."""
    made = {one.path: one for one in program.weights if one.made is not None}

    def give(path: str) -> Given:
        if path in made:
            spec = made[path].made
            assert isinstance(spec, Sinusoidal)
            return _of_tensor(SinusoidalPart(spec).rows(made[path].shape[0] or room))
        if path not in tensors:
            raise RunError(f"the program reads {path}, which is not among the weights")
        return _of_tensor(tensors[path])

    return give


def _of_tensor(tensor: Tensor) -> Given:
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype not in DTYPES:
        tensor = tensor.float()
    rows, columns = tensor.shape if tensor.ndim == 2 else (1, tensor.numel())
    data = tensor.view(-1).view(torch.uint8).numpy()
    return Given(DTYPES[tensor.dtype], data, rows, columns)


def from_gguf(program: Program, file: GgufFile, family: Family, config: Mapping[str, Any], room: int) -> Giver:
    """Return what gives a program the tensors of a GGUF file: matrices as the blocks that they are stored in.

    A tensor that is made in another way than by taking rows or columns is converted to floats first.
    """
    tables = gguf_tables(family, config)
    rows = LinesOf(file, file.tensors, tables)
    converted = from_tensors(program, through(tables, file.tensors), room)
    shapes = {one.path: one.shape for one in program.weights}

    def give(path: str) -> Given:
        found = rows.of(path, shapes[path])
        if found is None:
            return converted(path)
        return given_lines(file.types[found.tensor], file.stored[found.tensor], found.order, found.by)

    return give


def gguf_tables(family: Family, config: Mapping[str, Any]) -> tuple[Names, ...]:
    """Return the tables by which a GGUF file's tensors become ours."""
    return gguf_names(config), family.names()


def through(tables: Sequence[Names], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors by our names, after tables of names in a row."""
    for table in tables:
        tensors = table.to_ours(tensors)
    return tensors


class Found(NamedTuple):
    """Of which stored tensor one of ours is made, of its rows or its columns, and in what order; None for all."""

    tensor: str
    order: npt.NDArray[np.int64] | None
    by: Lines


class LinesOf:
    """Finds out which rows, or columns, of which stored tensor make each of ours.

    Names and layouts are those of the family's own tables. What they do to rows they are shown on the numbers of the
    rows: the order that comes out is the order in which the rows are taken from the file; and so with columns, where
    a table turns a matrix. The rows of a vector are its numbers.

    Attributes:
        others: names of stored tensors that are no weights; they were checked.
        ours: the names of all tensors that come out.
    """

    def __init__(self, store: Store, tensors: Mapping[str, Tensor], tables: Sequence[Names]) -> None:
        self.types = store.types
        weights = tables[0].checked(tensors) if tables else list(tensors)
        self.others = sorted(set(tensors) - set(weights))
        self.names = [name for name in weights if self._has(name, "rows")]
        self._shown: dict[Lines, Mapping[str, Tensor]] = {by: self._numbers(weights, tables, by) for by in BY}
        self.ours = frozenset(self._shown["rows"])

    def of(self, path: str, shape: tuple[int, ...]) -> Found | None:
        """Return what one of ours, of this shape, is made of; None where it is made in another way."""
        for by, shown in self._shown.items():
            try:
                found = shown.get(path)
            except (WeightsError, RuntimeError):
                continue
            if found is not None and found.dtype == torch.long and found.numel():
                lines = self._lines(found.numpy(), shape, by)
                if lines is not None:
                    return lines
        return None

    def _lines(self, numbers: npt.NDArray[np.int64], shape: tuple[int, ...], by: Lines) -> Found | None:
        """Return what numbers of rows or columns that came out of the tables say; None if not all are of one tensor."""
        name = self.names[int(numbers.flat[0]) >> 32]
        stored = self.types[name][1]
        if len(stored) == 2 and numbers.shape[1:] == (1,):
            numbers = numbers[:, 0]
        if numbers.ndim != 1 or bool((numbers >> 32 != numbers[0] >> 32).any()):
            return None
        across = stored[1:] if by == "rows" else stored[:1]
        if (len(numbers), *across) != (shape or (1,)):
            return None
        taken = np.ascontiguousarray(numbers & 0xFFFFFFFF, dtype=np.int64)
        whole = np.array_equal(taken, np.arange(stored[BY.index(by)]))
        return Found(name, None if whole else taken, by)

    def _numbers(self, weights: Sequence[str], tables: Sequence[Names], by: Lines) -> Mapping[str, Tensor]:
        """Return what the tables make of the numbers of rows or columns."""

        def shown(number: int, name: str) -> Tensor:
            shape = self.types[name][1]
            lines = torch.arange(shape[BY.index(by)]) + (number << 32)
            return lines if len(shape) == 1 else lines[:, None] if by == "rows" else lines[None, :]

        readers = {name: functools.partial(shown, i, name) for i, name in enumerate(self.names) if self._has(name, by)}
        rest = {name: functools.partial(torch.zeros, 1) for name in weights if name not in readers}
        return through(tables, TensorMap({name: (readers | rest)[name] for name in weights}, repr))

    def _has(self, name: str, by: Lines) -> bool:
        """Tell whether a stored tensor can be taken by such lines: whole blocks lie in a row."""
        kind, shape = self.types[name]
        if by == "columns" or len(shape) == 1:
            return kind in SOURCES and kind not in OWN_KINDS and len(shape) == 1 + (by == "columns")
        return kind in SOURCES and len(shape) == 2
