"""A program and its weights on the native side, and the sequences that it runs there. Nothing here needs PyTorch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyformer.errors import RunError
from polyformer.native.library import call, required
from polyformer.native.program import Program
from polyformer.native.words import packed_weights, shape_of, words_of
from polyformer.spec import Record

Kind = Literal["f32", "q8", "q8m", "q4", "q4m"]
KINDS: tuple[Kind, ...] = ("f32", "q8", "q8m", "q4", "q4m")
"""How matrices are held: floats, or whole numbers of 8 or 4 bits in groups of 32, with minima ("m") or without."""

SOURCES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
"""What tensors may be given as, by ggml's numbers."""

OWN_KINDS: dict[str, Kind] = {"Q4_0": "q4", "Q4_1": "q4m", "Q4_K": "q4m", "Q8_0": "q8", "Q6_K": "q8"}
"""The kind that holds a format as it is; of Q6_K, whose groups are of 16, the one that comes nearest."""

RETRACTS = 64
"""Tokens that a slot can always be cut back by, where it has forgotten what lies before a window."""


TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
"""Where Linux says which processors are one core."""


class Machine(Record):
    """How programs are run.

    Attributes:
        slots: how many sequences there may be at once.
        room: how many tokens each may have; memory is taken as it is needed.
        threads: how many work at a step.
        cache: in what precision keys and values are held.
        kernels: "best" are those for this processor, "portable" those for any.
    """

    slots: int = 1
    room: int = 2048
    threads: int = 2
    cache: Literal["f32", "f16", "i8"] = "f32"
    kernels: Literal["best", "portable"] = "best"


def processors() -> int:
    """Return how many threads may work, by the rules of PyTorch, which is asked itself where somebody uses it.

    That is what `OMP_NUM_THREADS` says, or else as many as there are cores for this program: two threads of one core
    would only wait for each other.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if said.isdecimal() and int(said) > 0:
        return min(int(said), 256)
    if not hasattr(os, "sched_getaffinity"):
        return min(os.cpu_count() or 1, 256)
    places = ((one, Path(TOPOLOGY.format(one))) for one in os.sched_getaffinity(0))
    return min(len({place.read_text() if place.exists() else str(one) for one, place in places}), 256)


@dataclass(frozen=True)
class Given:
    """A tensor as it is handed over.

    Attributes:
        source: its format.
        data: its bytes, whole rows one after the other.
        rows, columns: its shape as it lies there.
        order: which of its rows are wanted, in what order; None for all, as they are.
    """

    source: str
    data: npt.NDArray[np.uint8]
    rows: int
    columns: int
    order: npt.NDArray[np.int64] | None = None


class NativeModel:
    """A program and its weights, packed for this machine.

    Args:
        give: returns a tensor by its path.
        kind: says how a matrix is held, by its path and how it is given.
    Raises:
        RunError: a program or a weight that the native side refuses.
    """

    def __init__(
        self, program: Program, give: Callable[[str], Given], kind: Callable[[str, Given], Kind], room: int
    ) -> None:
        self.program = program
        words = np.array(words_of(program, room), dtype=np.int64)
        self.handle = ctypes.c_void_p()
        call("pf_model_new", words.ctypes.data, len(words), ctypes.byref(self.handle))
        packed = packed_weights(program)
        for number, one in enumerate(program.weights):
            given = give(one.path)
            wanted = shape_of(one, room)
            if given.columns != wanted[1]:
                raise RunError(f"{one.path} has rows of {given.columns}, but the program wants {list(wanted)}")
            chosen = kind(one.path, given) if one.path in packed else "f32"
            order = None if given.order is None else np.ascontiguousarray(given.order, dtype=np.int64)
            if order is not None and len(order) != wanted[0]:
                raise RunError(f"{one.path} has {len(order)} rows, but the program wants {list(wanted)}")
            data, place = np.ascontiguousarray(given.data), None if order is None else order.ctypes.data
            shape = (
                KINDS.index(chosen),
                SOURCES[given.source],
                data.ctypes.data,
                data.nbytes,
                given.rows,
                given.columns,
            )
            call("pf_model_give", self.handle, number, *shape, place)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            required().pf_model_free(self.handle)


class NativeState:
    """Sequences in slots, and steps over them."""

    def __init__(self, model: NativeModel, machine: Machine) -> None:
        self.model, self.machine = model, machine
        cell = ("f32", "f16", "i8").index(machine.cache)
        self.handle = ctypes.c_void_p()
        room = min(machine.room, model.program.length or machine.room)
        sizes = (machine.slots, room, cell, machine.threads, int(machine.kernels == "portable"))
        call("pf_state_new", model.handle, *sizes, ctypes.byref(self.handle))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            required().pf_state_free(self.handle)

    @property
    def kernels(self) -> str:
        """What the kernels that run are written for."""
        name: bytes = required().pf_state_kernels(self.handle)
        return name.decode()

    @property
    def bytes(self) -> int:
        """The memory that all slots take."""
        return int(required().pf_state_bytes(self.handle))

    def bytes_for(self, tokens: int, source: int = 0) -> int:
        """Return the memory that a slot takes for so many tokens, and a text of so many that was read."""
        return int(required().pf_state_bytes_for(self.handle, tokens, source))

    def step(
        self, ids: Sequence[int], slots: Sequence[int], places: Sequence[int], wanted: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Read tokens, each at its place in its slot; return the scores behind those wanted (by index) [W, V].

        The tokens of a slot are in order. The first may stand anywhere up to the slot's end; what the slot held from
        there on is forgotten.

        Raises:
            RunError: a slot or a token that isn't there, a gap before a token, or a place beyond the room.
        """
        given = _given(ids, slots, places, wanted)
        scores = np.empty((len(wanted), self.model.program.vocabulary), dtype=np.float32)
        call("pf_step", self.handle, *_addresses(given), scores.ctypes.data)
        return scores

    def best(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        places: Sequence[int],
        wanted: Sequence[int],
        count: int,
        forbidden: Sequence[int] = (),
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Do what `step` does, but find the likeliest next tokens there: their log-probabilities and ids [W, count].

        The best come first; of equally likely ones those with lower ids. What is forbidden keeps its share of the
        probability. If there are too few tokens, impossible ones follow; scores that are no numbers give such ones.
        """
        given, barred = _given(ids, slots, places, wanted), np.unique(np.asarray(forbidden, dtype=np.int64))
        likely, found = (np.empty((len(wanted), count), dtype=kind) for kind in (np.float32, np.int64))
        choice = (count, len(barred), barred.ctypes.data)
        call("pf_best", self.handle, *_addresses(given), *choice, likely.ctypes.data, found.ctypes.data)
        return likely, found

    def read(self, ids: Sequence[int], slot: int) -> None:
        """Let the encoder read a text, which the slot's tokens will look at; whatever it held is dropped."""
        self.read_all({slot: ids})

    def read_all(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Let the encoder read texts for slots, all at once."""
        ids = np.array([token for text in texts.values() for token in text], dtype=np.int64)
        slots = np.repeat(np.array(list(texts), dtype=np.int64), [len(text) for text in texts.values()])
        call("pf_read", self.handle, len(ids), ids.ctypes.data, slots.ctypes.data)

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return self._told("pf_length", slot)

    def earliest(self, slot: int) -> int:
        """Return the least length above 0 that a slot can be cut back to; what lies before windows is forgotten."""
        return self._told("pf_earliest", slot)

    def _told(self, name: str, slot: int) -> int:
        found = ctypes.c_int64()
        call(name, self.handle, slot, ctypes.byref(found))
        return found.value

    def truncate(self, slot: int, length: int) -> None:
        """Keep only the first so many tokens; what was read stays."""
        call("pf_truncate", self.handle, slot, length)

    def clear(self, slot: int) -> None:
        """Forget all that a slot holds, and give its memory back."""
        call("pf_clear", self.handle, slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first tokens of another, and share what that has read."""
        call("pf_copy", self.handle, source, target, length)


def _given(
    ids: Sequence[int], slots: Sequence[int], places: Sequence[int], wanted: Sequence[int]
) -> tuple[npt.NDArray[np.int64], ...]:
    if not len(ids) == len(slots) == len(places):
        raise RunError(f"{len(ids)} tokens need as many slots and places, not {len(slots)} and {len(places)}")
    return tuple(np.asarray(one, dtype=np.int64) for one in (ids, slots, places, wanted))


def _addresses(given: tuple[npt.NDArray[np.int64], ...]) -> tuple[int, int, int, int, int, int]:
    """Return what a step's call is told: how many tokens there are and where, and which are wanted."""
    ids, slots, places, rows = given
    return len(ids), ids.ctypes.data, slots.ctypes.data, places.ctypes.data, len(rows), rows.ctypes.data
