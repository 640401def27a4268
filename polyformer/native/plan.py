"""A plan: a program, and where in a file each of its weights lies. With it a model starts without PyTorch.

It is made once (`polyformer.native.planning`), from the spec and the family's tables of names, and is data as the
program is: it can be kept in a file and read again where nothing but the native side is wanted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from polyformer.errors import SpecError
from polyformer.native.machine import Given
from polyformer.native.program import Program, TakeTokens
from polyformer.spec import Record

Bytes = npt.NDArray[np.uint8]
Lines = Literal["rows", "columns"]


class Store(Protocol):
    """Tensors as a file holds them; a GGUF file is one, and so is a folder of safetensors files."""

    @property
    def types(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The format of each, and its shape in PyTorch's order."""

    @property
    def stored(self) -> Mapping[str, Bytes]:
        """The bytes of each."""


class Origin(Record):
    """Where a weight lies: whole rows or, where it lies turned, columns of a stored tensor.

    The rows of a vector are its numbers. `order` is a number in `Plan.orders`; None for all of them as they are.
    """

    tensor: str
    order: int | None = None
    by: Lines = "rows"


class Witness(Record):
    """A tensor that is no weight, but that the plan follows from: the SHA-256 of its bytes."""

    tensor: str
    sha256: str


class Plan(Record):
    """What runs a decoder from a file.

    Attributes:
        origins: where each of the program's weights lies, in their order.
        orders: in which order rows are taken.
        witnesses: the tensors that are no weights.
        context: for how many tokens it was made, where its positions have no end.
        ends: the tokens that end a text; None where only the tokenizer says that.
    """

    program: Program
    origins: tuple[Origin, ...]
    orders: tuple[tuple[int, ...], ...] = ()
    witnesses: tuple[Witness, ...] = ()
    context: int | None = None
    ends: tuple[int, ...] | None = None

    def check(self) -> None:
        weights, known = self.program.weights, range(len(self.orders))
        self.require(len(self.origins) == len(weights), f"{len(weights)} weights need as many origins")
        self.require(all(one.order is None or one.order in known for one in self.origins), "an order is missing")

    @property
    def tokens(self) -> int:
        """How many tokens texts are made of."""
        tables = {one.table for one in self.program.write if isinstance(one, TakeTokens)}
        return max((one.shape[0] for one in self.program.weights if one.path in tables), default=0)

    def fits(self, store: Store) -> bool:
        """Tell whether a file holds what the plan was made of, as far as its tensors go."""
        there = {one.tensor for one in self.origins} | {one.tensor for one in self.witnesses} <= store.types.keys()
        return there and all(digest(store.stored[one.tensor]) == one.sha256 for one in self.witnesses)


@dataclass(frozen=True)
class PlannedWeights:
    """Gives a plan's weights from a file, each when it is asked for."""

    plan: Plan
    store: Store

    def __call__(self, path: str) -> Given:
        """Return a weight by its path; raises `SpecError` for one that isn't planned."""
        number = next((i for i, one in enumerate(self.plan.program.weights) if one.path == path), None)
        if number is None:
            raise SpecError(f"the plan knows no weight {path}")
        origin = self.plan.origins[number]
        kind, shape = self.store.types[origin.tensor]
        data = self.store.stored[origin.tensor]
        order = None if origin.order is None else np.array(self.plan.orders[origin.order], dtype=np.int64)
        return given_lines((kind, shape), data, order, origin.by)


def given_lines(
    kind_and_shape: tuple[str, tuple[int, ...]], data: Bytes, order: npt.NDArray[np.int64] | None, by: Lines
) -> Given:
    """Return a stored matrix or vector, of which rows, columns or numbers are taken in an order, None for all."""
    kind, shape = kind_and_shape
    if by == "columns":
        numbers = data.reshape(*shape, -1)
        taken = np.ascontiguousarray((numbers if order is None else numbers[:, order]).swapaxes(0, 1))
        return Given(kind, taken.reshape(-1), len(taken), shape[0])
    if len(shape) == 2:
        return Given(kind, data, *shape, order)
    if order is not None:
        data = data.reshape(shape[0], -1)[order].reshape(-1)
    return Given(kind, data, 1, shape[0] if order is None else len(order))


def digest(data: Bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(data.data).hexdigest()
