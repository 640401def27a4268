"""A cache that forgets what no later token looks at, and which cache a model is best served by.

Shape letters: B batch, K key length, G key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyformer.parts.flow import Buffer, Pair, StaticCache
from polyformer.parts.rules import Rule
from polyformer.spec import Spec, walk


@dataclass
class _Strip:
    """The last keys and values of a slot, as a run of rows of two buffers.

    Attributes:
        buffers: of keys and of values.
        low, high: the run's rows.
        first: the place of its first row.
    """

    buffers: tuple[Buffer, Buffer]
    low: int
    high: int
    first: int

    @classmethod
    def of(cls, pair: Pair, first: int) -> _Strip:
        """Hold keys and values [B, G, K, E], with room for an eighth more of them."""
        count = pair[0].shape[2]
        buffers = (Buffer(pair[0], count + max(count // 8, 16)), Buffer(pair[1], count + max(count // 8, 16)))
        for buffer, x in zip(buffers, pair, strict=True):
            buffer.write(0, x)
        return cls(buffers, 0, count, first)

    def held(self) -> Pair:
        """Return keys and values, each [B, G, K, E]."""
        keys, values = (buffer.rows[self.low : self.high].permute(1, 2, 0, 3) for buffer in self.buffers)
        return keys, values

    def append(self, new: Pair) -> bool:
        """Hold more, if there is room."""
        end = self.high + new[0].shape[2]
        if end > self.buffers[0].shape[0]:
            return False
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer.write(self.high, x)
        self.high = end
        return True


@dataclass
class SlidingCache(StaticCache):
    """A cache in which attentions to a window hold the last tokens only, so that their bytes don't grow with the text.

    Others, as those between the windows of Gemma 2, hold all, in `room` as in a `StaticCache`. What a window's
    attention gets are the last keys, and `forgotten` says how many before them are gone. They stand in the order of the
    text in a buffer an eighth longer than the window, and move to its front when it is full: a ring, which needs no
    such room, would hand them out in another order at every token, and each mask and bias with them.
    """

    _strips: dict[str, _Strip] = field(default_factory=dict)
    _gone: dict[str, int] = field(default_factory=dict)

    def extend(self, slot: str, key_BGSE: Tensor, value_BGSE: Tensor, back: int | None = None) -> Pair:
        if back is None:
            return super().extend(slot, key_BGSE, value_BGSE)
        since = max(self.length + key_BGSE.shape[2] - back, 0)
        strip, new = self._strips.get(slot), (key_BGSE, value_BGSE)
        first = self.length if strip is None else strip.first
        self._gone[slot] = first
        if strip is not None and strip.append(new):
            found = strip.held()
            dropped = max(since - first, 0)
            strip.low, strip.first = strip.low + dropped, first + dropped
            return found
        if strip is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(strip.held(), new, strict=True))
            new = (keys, values)
        dropped = max(since - first, 0)
        self._strips[slot] = _Strip.of((new[0][:, :, dropped:], new[1][:, :, dropped:]), first + dropped)
        return new

    def forgotten(self, slot: str) -> int:
        return self._gone.get(slot, 0)

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        for strip in self._strips.values():
            for buffer in strip.buffers:
                buffer.reorder(rows, strip.high, None)

    @property
    def bytes(self) -> int:
        strips = (buffer.piece.nbytes for strip in self._strips.values() for buffer in strip.buffers)
        return sum(strips) + super().bytes


def cache_for(spec: Spec, room: int) -> StaticCache:
    """Return the cache that a model is best served by, with room for so many tokens at first.

    Where an attention looks back no further than a window, that is one which forgets what lies before it.
    """
    rules = (getattr(record, "see", None) for _, record in walk(spec))
    forgets = any(isinstance(rule, Rule) and rule.forgetful for rule in rules)
    return SlidingCache(room=room) if forgets else StaticCache(room=room)
