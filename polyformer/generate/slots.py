"""Runs any decoder of ours in PyTorch for the engine: a cache to each slot, and one pass over the rows of all.

The rows of a step stand behind each other as a batch of one (`Flow.joined`): what a layer does by row, it does once
for all sequences, and attention asks each sequence's own cache. So nothing is padded, and no sequence's answer depends
on its company beyond the rounding of matrix products.

Shape letters: G key/value heads, K keys, E head width, R rows, W wanted rows, V vocabulary.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.generate.candidates import best_tokens
from polyformer.generate.runner import Rows
from polyformer.generate.search import evaluating, positions_of
from polyformer.parts import Adapter, Prompt, TokenEmbedding
from polyformer.parts.adapters import mixed
from polyformer.parts.contract import Refuses, contract_of
from polyformer.parts.flow import Flow, Mix, Pair, State
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

    Attributes:
        mix: the adapters that act on it; None for those that the model is set to.
        lead: tokens of an adapter's prompt, which are read before the text and are no part of it.
    """

    def __init__(self, mix: Mix | None = None, lead: tuple[int, ...] = ()) -> None:
        self.mix, self.lead = mix, lead
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
        made = SlotCache(self.mix, self.lead)
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
    def text(self) -> int:
        """How many tokens of the text are held."""
        return max(self.length - len(self.lead), 0)

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


class _Run(NamedTuple):
    """The rows of one sequence in a step: where it is held, its new tokens, and how many of them lead it."""

    cache: SlotCache
    ids: list[int]
    lead: int


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
        bounds = [one for one in (positions, _places_left(_given(spec, "target"))) if one is not None]
        self.model, self.slots = model, slots
        self.positions = min(bounds, default=None)
        self.source_positions = _places_left(_given(spec, "source")) if model.source is not None else None
        self.vocabulary = _vocabulary(_given(spec, "target")) or 0
        self.source_vocabulary = _vocabulary(_given(spec, "source"))
        self.reads_source = model.encoder is not None
        self.version: Hashable = 0
        self.device = next(model.parameters()).device
        self.adapters = tuple(dict.fromkeys(one.name for _, one in walk(spec) if isinstance(one, Adapter)))
        self._caches = [self._empty() for _ in range(slots)]
        self._sizes: SlotSizes | None = None

    def step(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """Run the rows; a step that raises has changed nothing that counts."""
        return self._after(rows, wanted, self._scores)

    def best(self, rows: Rows, wanted: Sequence[int], count: int, forbidden: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the rows, and find the likeliest next tokens without making the scores of all at once."""
        head = self.model.head
        assert head is not None
        barred = torch.tensor(list(forbidden), device=self.device, dtype=torch.long)
        return self._after(rows, wanted, lambda hidden, _: best_tokens(head, hidden, count, barred))

    def _after(self, rows: Rows, wanted: Sequence[int], make: Callable[[Tensor, Flow | None], T]) -> T:
        """Run the rows and return what is made of those wanted [W, D], and of a flow that tells whose they are."""
        runs, start = list[_Run](), 0
        for slot, group in groupby(rows.slots):
            count, cache = len(list(group)), self._caches[slot]
            lead = () if cache.length else cache.lead
            runs.append(_Run(cache, [*lead, *rows.ids[start : start + count]], len(lead)))
            start += count
        places, flow = _among(runs, wanted), None
        before = [dict(run.cache.states) for run in runs]
        try:
            with evaluating(self.model):
                hidden = self._run(runs)
                picked = len(places) < len(hidden)
                if self.adapters and places:
                    flow = self._whose(runs, places)
                found = make(hidden[torch.tensor(places, device=self.device).long()] if picked else hidden, flow)
        except BaseException:
            for run, states in zip(runs, before, strict=True):
                run.cache.states = states
            raise
        for run in runs:
            run.cache.advance(len(run.ids))
        return found

    def _run(self, runs: Sequence[_Run]) -> Tensor:
        """Return the hidden rows [R, D]."""
        model, device = self.model, self.device
        target, decoder = model.target, model.decoder
        assert target is not None
        assert decoder is not None
        flows = []
        for cache, own, _ in runs:
            view = View(len(own), cache.length + len(own), None, None, False, device)
            positions = torch.arange(cache.length, cache.length + len(own), device=device)[None]
            flow = Flow(view, positions, cache=cache, inputs={"ids": torch.tensor([own], device=device)}, mix=cache.mix)
            if cache.source is not None:
                flow.memory = cache.source.hidden
                flow.memory_view = View(len(own), flow.memory.shape[1], None, None, False, device)
            flows.append(flow)
        flow = flows[0] if len(flows) == 1 else Flow.joined(flows)
        flow.path = "decoder."
        found: Tensor = decoder(target(flow.inputs["ids"], flow), flow)[0]
        return found

    def _whose(self, runs: Sequence[_Run], wanted: Sequence[int]) -> Flow:
        """Return a flow of the wanted rows alone, by which the head's adapters know theirs."""
        ends = list(itertools.accumulate(len(run.ids) for run in runs))
        counts = Counter(bisect.bisect_right(ends, place) for place in wanted)
        flows = []
        for i, count in sorted(counts.items()):
            view = View(count, count, None, None, False, self.device)
            flows.append(Flow(view, view.places, mix=runs[i].cache.mix))
        return Flow.joined(flows)

    def _scores(self, hidden: Tensor, flow: Flow | None) -> Tensor:
        """Return the scores [W, V] of rows [W, D]."""
        head = self.model.head
        assert head is not None
        scores = head(hidden, flow)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def use(self, slot: int, mix: Mix | None) -> None:
        """Let a mix of adapters act on what a slot will hold."""
        self._caches[slot] = self._empty(mix)

    def _empty(self, mix: Mix | None = None) -> SlotCache:
        return SlotCache(mix, _lead(_given(self.model.spec, "target"), mix))

    def read(self, sources: Mapping[int, Sequence[int]]) -> None:
        """Run the encoder for slots, one after the other."""
        for slot, source in sources.items():
            cache = self._caches[slot]
            ids = [*_lead(_given(self.model.spec, "source"), cache.mix), *source]
            with evaluating(self.model), mixed(self.model, cache.mix):
                cache.source = self.model.encode(torch.tensor([ids], device=self.device))

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return self._caches[slot].text

    def earliest(self, slot: int) -> int:
        """Return the least length that a slot can be cut back to."""
        cache = self._caches[slot]
        return max(cache.earliest - len(cache.lead), min(1, cache.text))

    @property
    def retracts(self) -> int:
        """How many of the last tokens a slot can always be cut back by."""
        return 0 if self._known_sizes.once else RETRACTS

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first tokens of a slot."""
        cache = self._caches[slot]
        if length and not self.earliest(slot) <= length <= cache.text:
            raise SpecError(f"a sequence of {cache.text} tokens can't be cut back to {length} here")
        cache.truncate(length + len(cache.lead) if length else 0)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a slot hold what another one does."""
        cache = self._caches[source]
        if not self.earliest(source) <= length <= cache.text:
            raise SpecError(f"a sequence of {cache.text} tokens can't be copied up to {length} here")
        self._caches[target] = cache.copy(length + len(cache.lead))

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        self._caches[slot] = self._empty()

    def bytes_for(self, tokens: int, source: int = 0) -> int:
        """Return how much memory a slot takes."""
        lead = _longest_lead(_given(self.model.spec, "target")) if tokens else 0
        sizes, room = self._known_sizes, in_blocks(tokens + lead)
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

    def _run(self, runs: Sequence[_Run]) -> Tensor:
        hidden = []
        for cache, own, _ in runs:
            new = torch.tensor(own, device=self.device).view(1, 1, -1, 1)
            ids, _ = cache.extend("ids", new, new)
            with mixed(self.model, cache.mix):
                hidden.append(self.model.decode(ids.flatten()[None], None, cache.source)[0, -len(own) :])
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


def _among(runs: Sequence[_Run], wanted: Sequence[int]) -> Sequence[int]:
    """Return where rows stand among all that are run, given their places among those of the texts."""
    leads = list(itertools.accumulate(run.lead for run in runs))
    if not any(leads):
        return wanted
    ends = list(itertools.accumulate(len(run.ids) - run.lead for run in runs))
    return [place + leads[bisect.bisect_right(ends, place)] for place in wanted]


def _prompts(embed: Record | None) -> list[Prompt]:
    """Return the prompts that may lead a side's texts."""
    return [one for _, one in walk(embed) if isinstance(one, Prompt)] if embed else []


def _lead(embed: Record | None, mix: Mix | None) -> tuple[int, ...]:
    """Return the tokens that a mix of adapters wants before a text."""
    acting = [one for one in _prompts(embed) if (one.share if mix is None else mix.get(one.name, 0.0))]
    return tuple(token for one in acting for token in one.ids)


def _longest_lead(embed: Record | None) -> int:
    return sum(one.tokens for one in _prompts(embed))


def _places_left(embed: Record | None) -> int | None:
    """Return how many places a text has, behind whatever prompts."""
    places = positions_of(embed)
    return None if places is None else max(places - _longest_lead(embed), 1)
