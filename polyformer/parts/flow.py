"""All that travels beside `x`: who is real, the encoder's output, the cache, a trace. And the caches.

Shape letters: B batch, S query length, K key length, D width, H heads, G key/value heads, E head width, T length
of the encoder's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.view import View

if TYPE_CHECKING:
    from polyformer.parts.experts import Routing

Pair = tuple[Tensor, Tensor]
State = tuple[Tensor, ...]
Mix = Mapping[str, float]
"""Which adapters act, by name, and in what share; those that it doesn't name don't."""
M = TypeVar("M")


class Cache(Protocol):
    """Keys and values of what was read before, by layer slot. A module stores none itself.

    `length` counts the tokens held, the same for every slot; the model advances it after each forward pass.
    `states` is for parts that hold sums in place of keys and values: tensors [B, ...] by slot, which they replace.
    """

    length: int
    states: dict[str, State]

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        """Hold the new keys and values behind the earlier ones and return all, each [B, G, K, E].

        With `back`, later tokens look back at no more than so many: a cache may forget those before them, and return
        the others only next time.
        """

    def forgotten(self, slot: str) -> int:
        """Return how many tokens, the first of the text, lack in what `extend` returned last for a slot."""

    def memory(self, slot: str, make: Callable[[], Pair]) -> Pair:
        """Return the keys and values of the encoder's output, made once by `make` and then held."""

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order, for self-attention (`rows`: integers [B'])."""

    def reorder_memory(self, rows: Tensor) -> None:
        """The same for what belongs to the encoder's output, whose batch may be smaller (one row per sentence)."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors held."""


@dataclass
class GrowingCache:
    """A cache that joins new keys to the old ones: no length to know beforehand, but each step copies."""

    length: int = 0
    states: dict[str, State] = field(default_factory=dict)
    _own: dict[str, Pair] = field(default_factory=dict)
    _memory: dict[str, Pair] = field(default_factory=dict)

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        if slot in self._own:
            key, value = self._own[slot]
            key_BGSE, value_BGSE = torch.cat((key, key_BGSE), 2), torch.cat((value, value_BGSE), 2)
        self._own[slot] = (key_BGSE, value_BGSE)
        return key_BGSE, value_BGSE

    def forgotten(self, slot: str) -> int:
        return 0

    def memory(self, slot: str, make: Callable[[], Pair]) -> Pair:
        if slot not in self._memory:
            self._memory[slot] = make()
        return self._memory[slot]

    def reorder(self, rows: Tensor) -> None:
        self._own = {slot: (k.index_select(0, rows), v.index_select(0, rows)) for slot, (k, v) in self._own.items()}
        self._reorder_states(rows)

    def reorder_memory(self, rows: Tensor) -> None:
        self._memory = {s: (k.index_select(0, rows), v.index_select(0, rows)) for s, (k, v) in self._memory.items()}

    def _reorder_states(self, rows: Tensor) -> None:
        self.states = {slot: tuple(t.index_select(0, rows) for t in state) for slot, state in self.states.items()}

    @property
    def bytes(self) -> int:
        held = (*self._own.values(), *self._memory.values(), *self.states.values())
        return sum(t.nbytes for tensors in held for t in tensors)


class Buffer:
    """What a slot holds of one kind (keys or values), laid out [room, B, G, E].

    In that order all that is held so far is one piece of memory, so that reordering the batch is one copy into
    another piece.
    """

    def __init__(self, like_BGSE: Tensor, room: int) -> None:
        batch, groups, _, width = like_BGSE.shape
        self.shape = (room, batch, groups, width)
        self.piece = like_BGSE.new_empty(math.prod(self.shape))

    @property
    def rows(self) -> Tensor:
        return self.piece[: math.prod(self.shape)].view(self.shape)

    def write(self, start: int, new_BGSE: Tensor) -> Tensor:
        """Put new tokens behind the first `start` and return all: [B, G, K, E]."""
        end = start + new_BGSE.shape[2]
        rows = self.rows
        rows[start:end] = new_BGSE.permute(2, 0, 1, 3)
        return rows[:end].permute(1, 2, 0, 3)

    def enlarge(self, room: int, length: int) -> None:
        """Make room for more tokens; the first `length` are kept."""
        held = self.rows[:length]
        self.shape = (room, *self.shape[1:])
        self.piece = held.new_empty(math.prod(self.shape))
        self.rows[:length] = held

    def reorder(self, rows: Tensor, length: int, spare: Tensor | None) -> Tensor:
        """Copy these rows of the first `length` tokens into `spare`, if it is large enough; return the old piece."""
        held = self.rows[:length]
        self.shape = (self.shape[0], len(rows), *self.shape[2:])
        wanted = math.prod(self.shape)
        old, fits = self.piece, spare is not None and spare.numel() >= wanted
        self.piece = spare if spare is not None and fits else held.new_empty(wanted)
        torch.index_select(held, 1, rows, out=self.rows[:length])
        return old


@dataclass
class StaticCache(GrowingCache):
    """A cache of fixed room: buffers for `room` tokens are made once and written in place.

    Reordering the batch copies each buffer into a spare one, which it then changes places with.

    Raises:
        SpecError: more tokens than `room`.
    """

    room: int = 0
    _buffers: dict[str, tuple[Buffer, Buffer]] = field(default_factory=dict)
    _spare: Tensor | None = None

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        end = self.length + key_BGSE.shape[2]
        if end > self.room:
            raise SpecError(f"the cache has room for {self.room} tokens, not {end}")
        if slot not in self._buffers:
            self._buffers[slot] = (Buffer(key_BGSE, self.room), Buffer(value_BGSE, self.room))
        keys, values = self._buffers[slot]
        return keys.write(self.length, key_BGSE), values.write(self.length, value_BGSE)

    def enlarge(self, room: int) -> None:
        """Make room for more tokens, at the cost of one copy."""
        self.room, self._spare = room, None
        for buffer in self._all():
            buffer.enlarge(room, self.length)

    def reorder(self, rows: Tensor) -> None:
        for buffer in self._all():
            batch = buffer.shape[1]
            if len(rows) != batch or not torch.equal(rows, torch.arange(batch, device=rows.device)):
                self._spare = buffer.reorder(rows, self.length, self._spare)
        self._reorder_states(rows)

    def _all(self) -> Iterator[Buffer]:
        return (buffer for pair in self._buffers.values() for buffer in pair)

    @property
    def bytes(self) -> int:
        spare = 0 if self._spare is None else self._spare.nbytes
        return sum(buffer.piece.nbytes for buffer in self._all()) + spare + super().bytes


class Separate(GrowingCache):
    """Stands where each sequence of a pass has a cache of its own (`Flow.apart` finds it); it holds nothing itself."""

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        raise SpecError(f"{slot} can't run several sequences behind each other: it would mix their keys")

    def memory(self, slot: str, make: Callable[[], Pair]) -> Pair:
        raise SpecError(f"{slot} can't run several sequences behind each other: it would mix their sources")


@dataclass
class Ahead:
    """A cache, or none, before whose keys a prefix stands: rows [P, G · E] of keys and of values, for every sequence.

    Places count the prefix. `length` and all else that lasts is the inner cache's; the prefix itself is not held.
    """

    inner: Cache | None
    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """How many tokens the inner cache holds."""
        return 0 if self.inner is None else self.inner.length

    @property
    def states(self) -> dict[str, State]:
        """The inner cache's."""
        return {} if self.inner is None else self.inner.states

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        """Hold the new keys and values; return them behind the prefix, or without it where no row looks so far back."""
        pair = key_BGSE, value_BGSE
        if self.inner is not None:
            pair = self.inner.extend(slot, *pair, back)
            if self.inner.forgotten(slot):
                return pair
        batch, groups, _, width = key_BGSE.shape
        shape = (len(self.keys), groups, width)
        ahead = (one.to(key_BGSE.dtype).view(shape).transpose(0, 1) for one in (self.keys, self.values))
        key, value = (torch.cat((one.expand(batch, *one.shape), own), 2) for one, own in zip(ahead, pair, strict=True))
        return key, value

    def forgotten(self, slot: str) -> int:
        """Return how many places lack, the prefix's among them."""
        lost = 0 if self.inner is None else self.inner.forgotten(slot)
        return lost + len(self.keys) if lost else 0

    def memory(self, slot: str, make: Callable[[], Pair]) -> Pair:
        """Return the keys and values of the encoder's output."""
        return make() if self.inner is None else self.inner.memory(slot, make)


@dataclass
class Trace:
    """What an explanation asks a forward pass to write down. Kernels fill it only when a flow carries one.

    Attributes:
        attention: softmax weights [B, H, S, K] by slot (`"decoder.2.steps.1.op"`), without dropout.
        routing: how rows were shared out among experts, by slot; differentiable.
        wants: which of them are asked for. Attention weights cost more than attention itself, so training, which
            needs the routing for its losses, asks for that alone.
    """

    attention: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)
    wants: frozenset[str] = frozenset(("attention", "routing"))


@dataclass
class Piece:
    """One sequence of a pass over several, which stand behind each other as a batch of one: its rows, its own flow."""

    rows: slice
    flow: Flow


@dataclass
class Flow:
    """One batch's company on its way through a stack.

    Attributes:
        view: queries and keys of self-attention.
        positions: integers [1 or B, S], the place of each row in its own sequence (not in the padded one).
        memory: the encoder's output [B', T, D] for cross-attention; B is B' or, with several hypotheses to a
            sentence, a multiple of it.
        memory_view: its keys, for cross-attention.
        cache: where keys and values of earlier tokens are held, or None.
        trace: where explanations are written, or None.
        inputs: what else came with the batch, by name: "ids" [B, S], and e.g. "token_type_ids" [B, S].
        grid: height and width of the rows where they are patches of an image, else None.
        path: the slots of the stacks that are being walked; kept by `Stack`.
        pieces: the sequences that the rows belong to, where they are several with caches of their own; B is 1 then.
            Whatever looks at other rows asks `apart`.
        choices: what choices came to in a pass that will be walked a second time, by slot, or None for any other pass.
        passages: how many rows of the batch belong to one question, where passages are read alone (`Passages`).
        mix: which adapters act; None for those that the model is set to.
    """

    view: View
    positions: Tensor
    memory: Tensor | None = None
    memory_view: View | None = None
    cache: Cache | Ahead | None = None
    trace: Trace | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    path: str = ""
    pieces: tuple[Piece, ...] = ()
    choices: dict[str, Tensor] | None = None
    passages: int = 1
    mix: Mix | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def joined(cls, flows: Sequence[Flow]) -> Flow:
        """Return the flow of several sequences' rows behind each other, for flows of B = 1.

        What layers do by row, they do once for all; what they do across rows, for each sequence by itself. Nothing is
        padded, and the lengths of sequences and of their caches don't matter.
        """
        pieces, start = [], 0
        for flow in flows:
            pieces.append(Piece(slice(start, start + flow.view.queries), flow))
            start += flow.view.queries
        view = View(start, start, None, None, False, flows[0].view.device)
        names = flows[0].inputs.keys()
        return cls(
            view=view,
            positions=torch.cat([flow.positions for flow in flows], 1),
            cache=Separate(),
            inputs={name: torch.cat([flow.inputs[name] for flow in flows], 1) for name in names},
            pieces=tuple(pieces),
        )

    def apart(self, work: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Return what `work` makes of rows that meet in it, for each sequence by itself where they are of several.

        Args:
            work: takes the `rows` and a flow, and returns [..., S, E'].
            rows: each [..., S, E].
        """
        if not self.pieces:
            return work(*rows, self)
        found = []
        for piece in self.pieces:
            piece.flow.path = self.path
            found.append(work(*(one[..., piece.rows, :] for one in rows), piece.flow))
        return torch.cat(found, -2)

    @property
    def continues(self) -> bool:
        """Whether a cache holds keys for other passes than this one."""
        return self.cache is not None and not (isinstance(self.cache, Ahead) and self.cache.inner is None)

    def mixes(self) -> tuple[tuple[int, Mix | None], ...]:
        """Return which adapters act on how many of the rows, in their order; one pair where it is the same for all."""
        if not self.pieces:
            return ((self.view.queries, self.mix),)

        def make() -> tuple[tuple[int, Mix | None], ...]:
            found: list[tuple[int, Mix | None]] = []
            for piece in self.pieces:
                rows, mix = piece.flow.view.queries, piece.flow.mix
                if found and found[-1][1] == mix:
                    rows += found.pop()[0]
                found.append((rows, mix))
            return tuple(found)

        return self.once("mixes", make)

    def choose(self, slot: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` chooses, integers without a gradient; in a second walk, what was chosen in the first.

        A second walk sees rows that are the same to rounding only, which could tip a choice between two that are near.
        """
        if self.choices is None:
            return make()
        if slot not in self.choices:
            self.choices[slot] = make()
        return self.choices[slot]

    def once(self, key: Hashable, make: Callable[[], M]) -> M:
        """Return what `make` gave the first time that `key` was asked for in this pass: layers share it."""
        if key not in self._made:
            self._made[key] = make()
        found: M = self._made[key]
        return found

    def renew(self, rows: int, lengths: Tensor | None = None, grid: tuple[int, int] | None = None) -> None:
        """Say that `x` now has other rows, as a convolution or a merging of patches makes them.

        What layers shared of the old rows is forgotten.

        Args:
            rows: how many there are.
            lengths: integers [B], how many of each sequence's are real, from the left; None if all are.
            grid: height and width of the rows, where they are patches of an image.
        Raises:
            SpecError: documents are packed into the rows, or a cache holds earlier ones.
        """
        if self.view.key_documents is not None or self.view.keys != self.view.queries:
            raise SpecError("rows can't be joined where documents are packed or a cache holds earlier rows")
        places = torch.arange(rows, device=self.view.device)[None]
        valid = None if lengths is None else places < lengths[:, None]
        self.view = View(rows, rows, valid, None, valid is not None, self.view.device)
        self.positions, self.grid = places, grid
        self._made.clear()

    @property
    def rows_valid(self) -> Tensor | None:
        """Boolean [B, S], which of the rows now in `x` are real; None if all are."""
        valid = self.view.valid
        return None if valid is None else valid[:, self.view.keys - self.view.queries :]


def start_flow(
    ids_BS: Tensor, valid: Tensor | None = None, documents: Tensor | None = None, cache: Cache | None = None
) -> Flow:
    """Begin a flow for the rows of `ids_BS`.

    Args:
        ids_BS: anything of shape [B, S, ...]: the rows that now go in.
        valid: [B, K], non-zero for real tokens, those held in the cache included; None if all are real.
        documents: integers [B, K] telling apart the documents packed into a row.
        cache: holds K - S tokens already.
    Raises:
        SpecError: a mask of the wrong shape.
    """
    batch, length = ids_BS.shape[:2]
    past = 0 if cache is None else cache.length
    device = ids_BS.device
    right_padded = False
    if valid is not None:
        if valid.shape != (batch, past + length):
            told = f"{past} cached and {length} new tokens" if past else f"{length} tokens"
            needed = [batch, past + length]
            raise SpecError(f"the attention mask has shape {list(valid.shape)}; {batch} rows of {told} need {needed}")
        valid = valid.bool()
        right_padded = not bool((valid[:, 1:] & ~valid[:, :-1]).any())
        if device.type == "cpu" and bool(valid.all()):
            valid = None
    if documents is not None and documents.shape != (batch, past + length):
        raise SpecError(f"document ids have shape {list(documents.shape)}, not {[batch, past + length]}")
    view = View(length, past + length, valid, documents, right_padded, device)
    return Flow(view=view, positions=view.places[:, past:], cache=cache)
