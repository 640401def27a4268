"""Runs any decoder of ours in PyTorch for the engine: a cache to each slot, and one pass over the rows of all.

The rows of a step stand behind each other as a batch of one (`Flow.joined`): what a layer does by row, it does once
for all sequences, and attention asks each sequence's own cache. So nothing is padded, and no sequence's answer depends
on its company beyond the rounding of matrix products.

Shape letters: G key/value heads, K keys, E head width, R rows, W wanted rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.generate.candidates import best_tokens
from polyformer.generate.runner import Rows
from polyformer.generate.search import evaluating, positions_of
from polyformer.parts import Prompt, TokenEmbedding
from polyformer.parts.contract import Refuses, contract_of
from polyformer.parts.flow import Flow, Pair, State
from polyformer.parts.model import Memory, TransformerPart
from polyformer.parts.view import View
from polyformer.spec import Record, walk

T = TypeVar("T")

BLOCK = 64
"""Tokens for which room is made at a time. Each time what is held is copied, which is little beside 64 steps."""

RETRACTS = 64
"""Tokens that a sequence can always take back: so many keys are held before a window."""


class SlotCache:
    """What one sequence holds: keys and values in buffers that grow by blocks, recurrent states, and its source.

    It is a `Cache` of a batch of one that can be cut back and copied. Of an attention to a window, the keys are held
    that its next token looks at, those that it would look at if the last `RETRACTS` tokens were taken back, and room
    for a block more.
    """

    def __init__(self) -> None:
        self.length = 0
        self.states: dict[str, State] = {}
        self.source: Memory | None = None
        self._own: dict[str, Pair] = {}
        self._first: dict[str, int] = {}  # the place of the first key held
        self._back: dict[str, int] = {}  # how many places back the next token looks
        self._memory: dict[str, Pair] = {}

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        """Hold new keys and values behind those of the first `length` tokens and return all, each [1, G, K, E].

        Nothing is forgotten before `advance`, so that a step which fails can be taken again.
        """
        start = self.length - self.forgotten(slot)
        end = start + key_BGSE.shape[2]
        if back is not None:
            self._back[slot] = back
        held = self._own.get(slot)
        if held is None or held[0].shape[2] < end:
            if held is None:
                held = (key_BGSE[:, :, :0], value_BGSE[:, :, :0])
            held = self._own[slot] = _moved(held, 0, start, in_blocks(end))
        keys, values = held
        keys[:, :, start:end] = key_BGSE
        values[:, :, start:end] = value_BGSE
        return keys[:, :, :end], values[:, :, :end]

    def forgotten(self, slot: str) -> int:
        """Return how many tokens lack."""
        return self._first.get(slot, 0)

    def advance(self, count: int) -> None:
        """Count tokens that were read, and forget the keys that were before the windows of all to come."""
        self.length += count
        for slot, back in self._back.items():
            first, room = self.forgotten(slot), room_behind(back)
            kept = self.length - back - RETRACTS
            if self.length - first >= room and kept > first:
                self._own[slot] = _moved(self._own[slot], kept - first, self.length - first, room)
                self._first[slot] = kept

    @property
    def earliest(self) -> int:
        """The least length above 0 that it can be cut back to; recurrent states can't be."""
        if self.states:
            return self.length
        return max((first + self._back[slot] for slot, first in self._first.items()), default=min(1, self.length))

    def memory(self, slot: str, make: Callable[[], Pair]) -> Pair:
        """Return the keys and values of the source, made once."""
        if slot not in self._memory:
            self._memory[slot] = make()
        return self._memory[slot]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, and give back the blocks behind them."""
        self.length = length
        if not length:
            self._own, self._first, self._back, self.states = {}, {}, {}, {}
        for slot, pair in self._own.items():
            held = length - self.forgotten(slot)
            if pair[0].shape[2] > in_blocks(held):
                self._own[slot] = _moved(pair, 0, held, in_blocks(held))

    def copy(self, length: int) -> SlotCache:
        """Return a cache of the first `length` tokens. States and the source are shared: they are never written to."""
        made = SlotCache()
        made.length, made.source = length, self.source
        made.states, made._memory = dict(self.states), dict(self._memory)
        made._first, made._back = dict(self._first), dict(self._back)
        for slot, pair in self._own.items():
            held = length - self.forgotten(slot)
            made._own[slot] = _moved(pair, 0, held, in_blocks(held))
        return made

    def reorder(self, rows: Tensor) -> None:
        """There is one row."""

    def reorder_memory(self, rows: Tensor) -> None:
        """There is one row."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors held."""
        held = (*self._own.values(), *self._memory.values(), *self.states.values())
        source = 0 if self.source is None else self.source.hidden.nbytes
        return source + sum(tensor.nbytes for tensors in held for tensor in tensors)


def in_blocks(tokens: int) -> int:
    """Return the room that is made for so many tokens."""
    return -(-tokens // BLOCK) * BLOCK


def room_behind(back: int) -> int:
    """Return the most room that an attention takes which looks back so many places."""
    return in_blocks(back + RETRACTS) + BLOCK


def _moved(pair: Pair, first: int, end: int, room: int) -> Pair:
    """Return keys and values first … end, copied to where there is room for so many."""
    keys, values = (x.new_empty(*x.shape[:2], room, x.shape[3]) for x in pair)
    keys[:, :, : end - first] = pair[0][:, :, first:end]
    values[:, :, : end - first] = pair[1][:, :, first:end]
    return keys, values


class SlotSizes(Record):
    """Bytes that a sequence takes: once, for each token it holds, and for each token of its source.

    `windows` are those of attentions to windows: bytes for each token, and the most tokens that there is room for.
    """

    once: int
    token: int
    source: int
    windows: tuple[tuple[int, int], ...] = ()


class TorchRunner:
    """A `Runner` of a model in PyTorch.

    Raises:
        SpecError: a model without a decoder or a head, whose source isn't text, or whose parts need all rows at once.
    """

    def __init__(self, model: TransformerPart, slots: int = 16, positions: int | None = None) -> None:
        """Make empty slots.

        Args:
            positions: the longest sequence, where the model's spec doesn't say it (rotary positions have no end).
        """
        if model.decoder is None or model.target is None or model.head is None:
            raise SpecError("writing a text needs a decoder with a language model head; this model has none")
        if model.source is not None and model.source.main != "input_ids":
            raise SpecError(f"the engine reads texts; this model's source is {model.source.main}")
        spec = model.spec
        bounds = [one for one in (positions, positions_of(_given(spec, "target"))) if one is not None]
        self.model, self.slots = model, slots
        self.positions = min(bounds, default=None)
        self.source_positions = positions_of(_given(spec, "source")) if model.source is not None else None
        self.vocabulary = _vocabulary(_given(spec, "target")) or 0
        self.source_vocabulary = _vocabulary(_given(spec, "source"))
        self.reads_source = model.encoder is not None
        self.version: Hashable = 0
        self.device = next(model.parameters()).device
        self._caches = [SlotCache() for _ in range(slots)]
        self._sizes: SlotSizes | None = None

    def step(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """Run the rows; a step that raises has changed nothing that counts."""
        return self._after(rows, wanted, self._scores)

    def best(self, rows: Rows, wanted: Sequence[int], count: int, forbidden: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the rows, and find the likeliest next tokens without making the scores of all at once."""
        head = self.model.head
        assert head is not None
        barred = torch.tensor(list(forbidden), device=self.device, dtype=torch.long)
        return self._after(rows, wanted, lambda hidden: best_tokens(head, hidden, count, barred))

    def _after(self, rows: Rows, wanted: Sequence[int], make: Callable[[Tensor], T]) -> T:
        """Run the rows and return what is made of those wanted [W, D]."""
        runs = [(slot, len(list(group))) for slot, group in groupby(rows.slots)]
        caches = [self._caches[slot] for slot, _ in runs]
        before = [dict(cache.states) for cache in caches]
        try:
            with evaluating(self.model):
                hidden = self._run(rows, [count for _, count in runs], caches)
                picked = len(wanted) < len(hidden)
                found = make(hidden[torch.tensor(wanted, device=self.device).long()] if picked else hidden)
        except BaseException:
            for cache, states in zip(caches, before, strict=True):
                cache.states = states
            raise
        for cache, (_, count) in zip(caches, runs, strict=True):
            cache.advance(count)
        return found

    def _run(self, rows: Rows, counts: Sequence[int], caches: Sequence[SlotCache]) -> Tensor:
        """Return the hidden rows [R, D]."""
        model, device = self.model, self.device
        target, decoder = model.target, model.decoder
        assert target is not None
        assert decoder is not None
        ids = torch.tensor([rows.ids], device=device)
        flows, start = [], 0
        for cache, count in zip(caches, counts, strict=True):
            here = slice(start, start + count)
            view = View(count, cache.length + count, None, None, False, device)
            positions = torch.tensor([rows.positions[here]], device=device)
            flow = Flow(view, positions, cache=cache, inputs={"ids": ids[:, here]})
            if cache.source is not None:
                flow.memory = cache.source.hidden
                flow.memory_view = View(count, flow.memory.shape[1], None, None, False, device)
            flows.append(flow)
            start += count
        flow = flows[0] if len(flows) == 1 else Flow.joined(flows)
        flow.path = "decoder."
        found: Tensor = decoder(target(ids, flow), flow)[0]
        return found

    def _scores(self, hidden: Tensor) -> Tensor:
        """Return the scores [W, V] of rows [W, D]."""
        head = self.model.head
        assert head is not None
        scores = head(hidden, None)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def read(self, sources: Mapping[int, Sequence[int]]) -> None:
        """Run the encoder for slots, one after the other."""
        with evaluating(self.model):
            for slot, source in sources.items():
                self._caches[slot].source = self.model.encode(torch.tensor([list(source)], device=self.device))

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return self._caches[slot].length

    def earliest(self, slot: int) -> int:
        """Return the least length that a slot can be cut back to."""
        return self._caches[slot].earliest

    @property
    def retracts(self) -> int:
        """How many of the last tokens a slot can always be cut back by."""
        return 0 if self._known_sizes.once else RETRACTS

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first tokens of a slot."""
        cache = self._caches[slot]
        if length and not self.earliest(slot) <= length <= cache.length:
            raise SpecError(f"a sequence of {cache.length} tokens can't be cut back to {length} here")
        cache.truncate(length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a slot hold what another one does."""
        cache = self._caches[source]
        if not self.earliest(source) <= length <= cache.length:
            raise SpecError(f"a sequence of {cache.length} tokens can't be copied up to {length} here")
        self._caches[target] = cache.copy(length)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        self._caches[slot] = SlotCache()

    def bytes_for(self, tokens: int, source: int = 0) -> int:
        """Return how much memory a slot takes."""
        sizes, room = self._known_sizes, in_blocks(tokens)
        windows = sum(token * min(room, most) for token, most in sizes.windows)
        return (sizes.once if tokens else 0) + sizes.token * room + windows + sizes.source * source

    @property
    def _known_sizes(self) -> SlotSizes:
        self._sizes = self._sizes or self._measured()
        return self._sizes

    def _measured(self) -> SlotSizes:
        """Find out what a token takes by running one."""
        used, self._caches = self._caches, [SlotCache()]
        try:
            if self.reads_source:
                self.read({0: [0]})
            self.step(Rows([0], [0], [0]), [])
            cache = self._caches[0]
            states = sum(tensor.nbytes for state in cache.states.values() for tensor in state)
            taken = {slot: (k.nbytes + v.nbytes) // BLOCK for slot, (k, v) in cache._own.items()}
            windows = tuple((taken.pop(slot), room_behind(back)) for slot, back in cache._back.items())
            keys = BLOCK * (sum(taken.values()) + sum(token for token, _ in windows))
            return SlotSizes(states, sum(taken.values()), cache.bytes - states - keys, windows)
        finally:
            self._caches = used

    @property
    def bytes(self) -> int:
        """How much memory all slots take now."""
        return sum(cache.bytes for cache in self._caches)


class RereadingRunner(TorchRunner):
    """Runs what can't go on from a cache (Reformer's hashing, say): each step reads a slot's whole text again.

    A slot holds ids in place of keys. What that costs grows with the square of a text's length; but any model with a
    decoder can write.
    """

    def _run(self, rows: Rows, counts: Sequence[int], caches: Sequence[SlotCache]) -> Tensor:
        hidden, start = [], 0
        for cache, count in zip(caches, counts, strict=True):
            new = torch.tensor(rows.ids[start : start + count], device=self.device).view(1, 1, -1, 1)
            ids, _ = cache.extend("ids", new, new)
            hidden.append(self.model.decode(ids.flatten()[None], None, cache.source)[0, -count:])
            start += count
        return torch.cat(hidden)


def runner_of(model: TransformerPart, slots: int = 16, positions: int | None = None) -> TorchRunner:
    """Return what runs a model: with caches where its parts can go on from them. Arguments are as for `TorchRunner`."""
    clash = contract_of(model.spec).get("cached")
    rereads = model.decoder is not None and clash is not None and isinstance(clash.term, Refuses)
    return (RereadingRunner if rereads else TorchRunner)(model, slots, positions)


def _vocabulary(embed: Record | None) -> int | None:
    sizes = [one.vocabulary for _, one in walk(embed) if isinstance(one, TokenEmbedding)] if embed else []
    prompts = [one.first + one.tokens for _, one in walk(embed) if isinstance(one, Prompt)] if embed else []
    return max(sizes[0], *prompts, 0) if sizes else None


def _given(spec: Record, name: str) -> Record | None:
    found: Record | None = getattr(spec, name)
    return found
