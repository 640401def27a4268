"""Where a program's weights come from: a model in memory, or the blocks of a GGUF file as they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyformer.errors import RunError, WeightsError
from polyformer.families import Family
from polyformer.families.gguf import gguf_names
from polyformer.native.machine import OWN_KINDS, SOURCES, Given
from polyformer.native.plan import Store, given_rows
from polyformer.native.program import Program
from polyformer.parts.positions import Sinusoidal, SinusoidalPart
from polyformer.weights.files import TensorMap
from polyformer.weights.gguf import GgufFile
from polyformer.weights.names import Names

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Giver = Callable[[str], Given]


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

    A tensor that is made in another way than by taking rows (`Rows`) is converted to floats first.
    """
    tables = gguf_tables(family, config)
    rows = RowsOf(file, file.tensors, tables)
    converted = from_tensors(program, through(tables, file.tensors), room)
    shapes = {one.path: one.shape for one in program.weights}

    def give(path: str) -> Given:
        found = rows.of(path, shapes[path])
        if found is None:
            return converted(path)
        name, order = found
        return given_rows(*file.types[name], file.stored[name], order)

    return give


def gguf_tables(family: Family, config: Mapping[str, Any]) -> tuple[Names, ...]:
    """Return the tables by which a GGUF file's tensors become ours."""
    return gguf_names(config), family.names()


def through(tables: Sequence[Names], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors by our names, after tables of names in a row."""
    for table in tables:
        tensors = table.to_ours(tensors)
    return tensors


class RowsOf:
    """Finds out which rows of which stored tensor make each of ours.

    Names and layouts are those of the family's own tables. What they do to rows they are shown on the numbers of the
    rows: the order that comes out is the order in which the rows are taken from the file. The rows of a vector are
    its numbers.

    Attributes:
        others: names of stored tensors that are no weights; they were checked.
        ours: the names of all tensors that come out.
    """

    def __init__(self, store: Store, tensors: Mapping[str, Tensor], tables: Sequence[Names]) -> None:
        self.types = store.types
        weights = tables[0].checked(tensors) if tables else list(tensors)
        self.others = sorted(set(tensors) - set(weights))
        self.names = [name for name in weights if _has_rows(*self.types[name])]
        shown = {name: functools.partial(self._numbered, i, name) for i, name in enumerate(self.names)}
        rest = {name: functools.partial(torch.zeros, 1) for name in weights if name not in shown}
        self._shown = through(tables, TensorMap({name: (shown | rest)[name] for name in weights}, repr))
        self.ours = frozenset(self._shown)

    def of(self, path: str, shape: tuple[int, ...]) -> tuple[str, npt.NDArray[np.int64] | None] | None:
        """Return the stored tensor and the order of its rows that make one of ours of this shape.

        None is the order of all as they are; and None is returned for what is made in another way.
        """
        try:
            found = self._shown.get(path)
        except (WeightsError, RuntimeError):
            return None
        if found is None or found.dtype != torch.long or not found.numel():
            return None
        numbers = found.numpy()
        name = self.names[int(numbers.flat[0]) >> 32]
        stored = self.types[name][1]
        if len(stored) == 2 and numbers.shape[1:] == (1,):
            numbers = numbers[:, 0]
        if numbers.ndim != 1 or bool((numbers >> 32 != numbers[0] >> 32).any()):
            return None
        if (len(numbers), *stored[1:]) != (shape or (1,)):
            return None
        taken = np.ascontiguousarray(numbers & 0xFFFFFFFF, dtype=np.int64)
        return name, None if np.array_equal(taken, np.arange(stored[0])) else taken

    def _numbered(self, number: int, name: str) -> Tensor:
        shape = self.types[name][1]
        rows = torch.arange(shape[0]) + (number << 32)
        return rows[:, None] if len(shape) == 2 else rows


def _has_rows(kind: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a stored tensor can be taken by rows: a matrix, or a vector of ordinary numbers."""
    return kind in SOURCES and (len(shape) == 2 or (len(shape) == 1 and kind not in OWN_KINDS))
