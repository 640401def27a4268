"""What a search asks of a model: a tree of hypotheses to each sentence, whose branches may go on and are cut off.

There are two: one holds a batch in a model's own cache in PyTorch, the other each branch in a slot of a `Runner`.

Shape letters: N sentences, W branches of each, R of them live, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from polyformer.generate.beams import Step
from polyformer.generate.candidates import Candidates, best_tokens
from polyformer.generate.runner import Counts, Rows, Runner
from polyformer.generate.scores import tensor_of
from polyformer.parts.caches import cache_for
from polyformer.parts.model import Memory, TransformerPart

FIRST_ROOM = 32
"""Tokens that a cache has room for at first; few answers come near their limit."""

PIECE = 256
"""Tokens of prompts that are read in a step."""


class Forest(Protocol):
    """The branches of a search, as a model holds them. Sentences are numbers, and stand in the order they joined in.

    Attributes:
        vocabulary: V.
        like: a tensor on the model's device and in its precision.
    """

    vocabulary: int
    like: Tensor

    def room(self, branches: int) -> int:
        """Return how many sentences of so many branches may join now."""

    def join(self, sentences: Sequence[int]) -> None:
        """Read what sentences follow upon. Each has one branch then, which stands first of its share of W."""

    def best(self, last: Tensor, live: Tensor, count: int, forbidden: Tensor) -> Candidates:
        """Let every live branch read its last token; return how it may go on [R, count], see `best_tokens`.

        Args:
            last: the last token of each branch [N · W].
            live: which of them are [N · W].
        """

    def scores(self, last: Tensor, live: Tensor) -> Tensor:
        """Do the same, but return the scores of all tokens [R, V]."""

    def follow(self, step: Step) -> None:
        """Keep the branches that live on, each under its new place; several may go on from one."""

    def beside(self) -> Forest:
        """Return a forest without sentences, whose may be those of this one, and must join after them."""

    def close(self) -> None:
        """Give back the memory of all sentences."""


class BatchForest:
    """All sentences of a batch in one cache in PyTorch; they join together.

    The memory's keys and values are held once to a sentence, self-attention's once to a branch.

    Args:
        memory: the encoder's output for all sentences.
        longest: how many tokens a branch may have.
    """

    def __init__(self, model: TransformerPart, memory: Memory, longest: int, counts: Counts) -> None:
        assert model.head is not None
        self.model, self.memory, self.head, self.like = model, memory, model.head, memory.hidden
        self.longest, self.counts = longest, counts
        self.vocabulary: int = self.head(memory.hidden[0, :0], None).shape[-1]
        self.cache = cache_for(model.spec, min(FIRST_ROOM, longest))
        self._joined = False

    def room(self, branches: int) -> int:
        """Return the number of sentences, and nothing once they have joined."""
        return 0 if self._joined else len(self.memory.hidden)

    def join(self, sentences: Sequence[int]) -> None:
        """All join at once, and their memory is there."""
        self._joined = True

    def best(self, last: Tensor, live: Tensor, count: int, forbidden: Tensor) -> Candidates:
        """Return the best continuations, found in pieces."""
        return best_tokens(self.head, self._hidden(last, live), count, forbidden)

    def scores(self, last: Tensor, live: Tensor) -> Tensor:
        """Return all scores."""
        scores: Tensor = self.head(self._hidden(last, live), None)
        return scores

    def _hidden(self, last: Tensor, live: Tensor) -> Tensor:
        cache = self.cache
        if cache.length == cache.room:
            cache.enlarge(min(2 * cache.room, self.longest))
        self.counts.note(len(last))
        hidden = self.model.decode(last[:, None], None, self.memory, cache)[:, -1]
        return hidden if bool(live.all()) else hidden[live]

    def follow(self, step: Step) -> None:
        """Put the cache's rows in order."""
        if step.sentences is not None:
            self.memory = self.memory.select(step.sentences)
            self.cache.reorder_memory(step.sentences)
        self.cache.reorder(step.rows)

    def beside(self) -> BatchForest:
        """Return one that shares the memory."""
        return BatchForest(self.model, self.memory, self.longest, self.counts)

    def close(self) -> None:
        """The memory goes with this forest."""


class Text(NamedTuple):
    """What a search is to answer.

    Attributes:
        prompt: the ids that hypotheses follow upon, at least one; for an encoder–decoder what its decoder begins with.
        source: ids for the encoder, where there is one.
    """

    prompt: Sequence[int]
    source: Sequence[int] | None = None


@dataclass
class _Pool:
    """The slots that several forests share, and how many of them hold branches of each sentence."""

    free: list[int]
    held: Counter[int] = field(default_factory=Counter)


class SlotForest:
    """Each branch in a slot of a runner. Sentences come and go at any time.

    What was read of a source is shared by the slots of its branches. Where several branches go on from one, all but one
    get a copy of what it holds.
    """

    def __init__(self, runner: Runner, texts: Sequence[Text], counts: Counts, beside: SlotForest | None = None) -> None:
        self.runner, self.texts, self.counts, self.first = runner, texts, counts, beside
        self.vocabulary, self.like = runner.vocabulary, torch.zeros(1)
        self._pool = _Pool(list(range(runner.slots)))
        self._sentences: list[int] = []
        self._slots: list[int] = []  # of each branch [N · W]; -1 where it isn't live
        self._length: dict[int, int] = {}
        self._begun: dict[int, int] = {}  # the slots of those who have just joined

    def room(self, branches: int) -> int:
        """Return for how many sentences there are slots."""
        return self.runner.slots // branches - len(self._pool.held)

    def join(self, sentences: Sequence[int]) -> None:
        """Read sources, all in one call, and all of the prompts but their last tokens."""
        if not sentences:
            return
        width = len(self._slots) // len(self._sentences) if self._sentences else 1
        slots = [self._pool.free.pop() for _ in sentences]
        self._begun = dict(zip(sentences, slots, strict=True))
        for sentence, slot in self._begun.items():
            self.runner.clear(slot)
            self._sentences.append(sentence)
            self._slots += [slot] + [-1] * (width - 1)
            self._pool.held[sentence] += 1
        if self.first is None:
            self._read([self.texts[sentence] for sentence in sentences], slots)
            return
        for sentence, slot in self._begun.items():
            other = self.first._begun[sentence]
            self._length[slot] = self.first._length[other]
            self.runner.copy(other, slot, self._length[slot])

    def _read(self, texts: Sequence[Text], slots: Sequence[int]) -> None:
        sources = {slot: text.source for slot, text in zip(slots, texts, strict=True) if text.source is not None}
        if sources:
            self.runner.read(sources)
        rows = [
            (slot, place, token)
            for slot, text in zip(slots, texts, strict=True)
            for place, token in enumerate(text.prompt[:-1])
        ]
        for start in range(0, len(rows), PIECE):
            self.runner.step(Rows(*map(list, zip(*rows[start : start + PIECE], strict=True))), [])
        for slot, text in zip(slots, texts, strict=True):
            self._length[slot] = len(text.prompt) - 1

    def best(self, last: Tensor, live: Tensor, count: int, forbidden: Tensor) -> Candidates:
        """Return the best continuations, which the runner finds."""
        rows = self._rows(last)
        found = self.runner.best(rows, range(len(rows.ids)), count, forbidden.tolist())
        self._lengthen(rows)
        return Candidates(*map(tensor_of, found))

    def scores(self, last: Tensor, live: Tensor) -> Tensor:
        """Return all scores."""
        rows = self._rows(last)
        found = self.runner.step(rows, range(len(rows.ids)))
        self._lengthen(rows)
        return tensor_of(found)

    def _rows(self, last: Tensor) -> Rows:
        pairs = [(slot, token) for slot, token in zip(self._slots, last.tolist(), strict=True) if slot >= 0]
        slots, ids = map(list, zip(*pairs, strict=True))
        self.counts.note(len(ids))
        return Rows(slots, [self._length[slot] for slot in slots], ids)

    def _lengthen(self, rows: Rows) -> None:
        for slot in rows.slots:
            self._length[slot] += 1

    def follow(self, step: Step) -> None:
        """Let each branch take over the slot that it goes on from, or a copy of it; others are free again."""
        wanted = [row if live else -1 for row, live in zip(step.rows.tolist(), step.live.tolist(), strict=True)]
        going_on = set(wanted)
        self._pool.free += [slot for row, slot in enumerate(self._slots) if slot >= 0 and row not in going_on]
        slots, taken = [-1] * len(wanted), set()
        for i, row in enumerate(wanted):
            if row < 0:
                continue
            slots[i] = self._slots[row]
            if row in taken:
                slots[i] = self._pool.free.pop()
                self._length[slots[i]] = self._length[self._slots[row]]
                self.runner.copy(self._slots[row], slots[i], self._length[slots[i]])
            taken.add(row)
        self._slots = slots
        if step.sentences is not None:
            staying = [self._sentences[i] for i in step.sentences.tolist()]
            self._pool.held -= Counter(self._sentences) - Counter(staying)
            self._sentences = staying

    def beside(self) -> SlotForest:
        """Return one that takes its slots from those of this one."""
        found = SlotForest(self.runner, self.texts, self.counts, self)
        found._pool = self._pool
        return found

    def close(self) -> None:
        """Clear all slots."""
        for slot in range(self.runner.slots):
            self.runner.clear(slot)
