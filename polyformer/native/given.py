"""Where a program's weights come from: a model in memory, or the blocks of a GGUF file as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyformer.errors import RunError, WeightsError
from polyformer.families import Family
from polyformer.families.gguf import gguf_names
from polyformer.native.machine import OWN_KINDS, Given, Kind
from polyformer.native.program import Program, TakeTokens
from polyformer.parts.positions import Sinusoidal, SinusoidalPart
from polyformer.weights.files import TensorMap
from polyformer.weights.gguf import GgufFile

Precision = Literal["as stored", "fp32", "q8", "q4"]
"""How matrices are held. "q4" keeps the table of tokens, and a head tied to it, in 8 bits, as most such files do."""

GROUP = 32
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

    Names and layouts are those of the family's own tables. What they do to rows they are shown on the numbers of the
    rows: the order that comes out is the order in which the rows are taken from the file. A tensor that is made in
    another way (transposed, say) is converted to floats first.
    """
    tables = gguf_names(config), family.names()
    names = [name for name, (kind, shape) in file.types.items() if kind in OWN_KINDS and len(shape) == 2]

    def numbered(number: int, name: str) -> Tensor:
        return (torch.arange(file.types[name][1][0]) + (number << 32))[:, None]

    rows = {name: (lambda n=n, name=name: numbered(n, name)) for n, name in enumerate(names)}
    shown = _through(tables, TensorMap({name: rows.get(name, lambda: torch.zeros(1)) for name in file.types}, repr))
    converted = from_tensors(program, _through(tables, file.tensors), room)

    def give(path: str) -> Given:
        order = _order_of(shown, path)
        if order is None:
            return converted(path)
        name = names[int(order[0]) >> 32]
        kind, (count, columns) = file.types[name]
        taken = (order & 0xFFFFFFFF).numpy().astype(np.int64)
        whole = len(taken) == count and bool((np.diff(taken) == 1).all())
        return Given(kind, file.stored[name], count, columns, None if whole else taken)

    return give


def _through(tables: tuple[Any, Any], tensors: TensorMap) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = tables[1].to_ours(tables[0].to_ours(tensors))
    return found


def _order_of(shown: Mapping[str, Tensor], path: str) -> Tensor | None:
    """Return the numbers of the stored rows that make a tensor, if it is made of whole rows of one stored tensor."""
    try:
        found = shown.get(path)
    except (WeightsError, RuntimeError):
        return None
    if found is None or found.dtype != torch.long or found.ndim != 2 or found.shape[1] != 1:
        return None
    one_source = bool((found >> 32 == found[0] >> 32).all())
    return found[:, 0] if one_source else None


def kinds_for(program: Program, precision: Precision) -> Callable[[str, Given], Kind]:
    """Return what says how each matrix is held."""
    tokens = {one.table for one in (*program.read, *program.write) if isinstance(one, TakeTokens)}
    places = {one.path for one in program.weights} - _multiplied(program) - tokens

    def kind(path: str, given: Given) -> Kind:
        if path in places or precision == "fp32":
            return "f32"
        if precision == "as stored":
            return OWN_KINDS.get(given.source, "f32")
        return "q4m" if precision == "q4" and path not in tokens else "q8"

    return kind


def _multiplied(program: Program) -> set[str]:
    from polyformer.native.program import Multiply

    steps = (*program.read, *program.write)
    return {matrix for one in steps if isinstance(one, Multiply) for matrix in one.matrices}
