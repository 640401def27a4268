"""Rules that speak of blocks of a row, as BigBird's do, and of single tokens that everyone looks at (Longformer).

Blocks are counted from the left end of the row, padding and all, as the published models count them: so they move
where padding stands before the tokens, and the last of them are others where padding stands behind (`Rule.ends`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.places import as_scores, at
from polyformer.parts.rules import All, Everyone, Joined, Nobody, Rule

if TYPE_CHECKING:
    from polyformer.parts.places import End
    from polyformer.parts.view import View

OLD_LENGTHS = (1024, 3072, 4096)
"""The lengths that BigBird was trained on, for which random blocks are drawn in another way."""


class BlockWindow(Rule):
    """A query looks at its own block and at `sides` blocks to either side (Zaheer et al. 2020, section 2)."""

    block: int
    sides: int = 1

    def check(self) -> None:
        self.require(self.block > 0, "block must be at least 1")
        self.require(self.sides >= 0, "sides must be at least 0")

    @property
    def grain(self) -> int:
        return self.block

    @property
    def ends(self) -> frozenset[End]:
        return frozenset(("left",))

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return (as_scores(keys) // self.block - as_scores(queries) // self.block).abs() <= self.sides

    def reach(self, view: View, queries: range) -> range:
        first = queries.start // self.block - self.sides
        behind = -(-queries.stop // self.block) + self.sides
        return range(max(first, 0) * self.block, min(behind * self.block, view.keys))


class Edges(Rule):
    """The first and the last blocks of a row are global: all queries look at them, and theirs look at all keys.

    With a `block` of 1, these are tokens. The last block may be shorter than the others.
    """

    block: int
    first: int = 1
    last: int = 1

    def check(self) -> None:
        self.require(self.block > 0, "block must be at least 1")
        self.require(min(self.first, self.last) >= 0, "first and last must be at least 0")

    @property
    def grain(self) -> int:
        return self.block

    @property
    def ends(self) -> frozenset[End]:
        return frozenset(("left", "right") if self.last else ("left",))

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        behind = self.behind(view)
        asking, asked = (as_scores(one) // self.block for one in (queries, keys))
        return (asking < self.first) | (asking >= behind) | (asked < self.first) | (asked >= behind)

    def behind(self, view: View) -> int:
        """Return the number of the first of the last blocks."""
        return -(-view.keys // self.block) - self.last


class RandomBlocks(Rule):
    """A query looks at `count` blocks drawn for its own block, in each of `heads` heads by itself.

    Each block draws `count` among the first 2 · `count` + 5 that are neither next to it nor the first or the last of
    those. Rows of `OLD_LENGTHS` draw in the way of the paper's own runs: for a row of `longest` tokens, from the first
    1024. Both ways, and the order of the draws from NumPy's generator (`seed`; the published models take the number of
    the layer), are those of the authors' code (Zaheer et al. 2020, appendix), which the reference library keeps for
    training: so a checkpoint is trained on as it was there.
    """

    block: int
    count: int
    heads: int
    seed: int = 0
    longest: int = 4096

    def check(self) -> None:
        self.require(min(self.block, self.count, self.heads) > 0, "block, count and heads must be at least 1")
        self.require(self.longest > 0, "longest must be at least 1")
        self.require(0 <= self.seed < 2**32, f"seed must be in [0, 2^32), not {self.seed}")

    @property
    def grain(self) -> int:
        return self.block

    @property
    def ends(self) -> frozenset[End]:
        return frozenset(("left", "right"))

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return self.times(view, queries, keys) > 0

    def times(self, view: View, queries: Tensor, keys: Tensor) -> Tensor:
        """Return how many times a query's block has drawn a key's: integers [b, H, ..., s, k]."""
        table = _times(self, -(-view.keys // self.block)).to(view.device)
        asking, asked = (as_scores(one) // self.block for one in (queries, keys))
        heads = torch.arange(self.heads, device=view.device).view(1, -1, *[1] * (asking.ndim - 2))
        return table[heads, asking, asked]


class InTraining(Rule):
    """A rule that holds in training; otherwise, it lets nobody look at anything, as a dropout drops nothing."""

    rule: Rule

    @property
    def grain(self) -> int:
        return self.rule.grain

    @property
    def ends(self) -> frozenset[End]:
        return self.rule.ends

    @property
    def looks_ahead(self) -> bool:
        return self.rule.looks_ahead

    def settled(self) -> Rule:
        return Nobody()

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return self.rule.among(view, queries, keys)


class Beyond(Rule):
    """A rule for rows of more than `length` tokens; in shorter ones everyone looks at everyone."""

    length: int
    rule: Rule

    def check(self) -> None:
        self.require(self.length >= 0, "length must be at least 0")

    @property
    def ends(self) -> frozenset[End]:
        return self.rule.ends | {"right"}

    def settled(self) -> Rule:
        return self.replace(rule=self.rule.settled())

    def here(self, view: View) -> Rule:
        return Everyone() if view.keys <= self.length else self.rule.here(view)

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        return None if view.keys <= self.length else self.rule.among(view, queries, keys)


class Marked(Rule):
    """Every query looks at the tokens that the batch marks as global (Beltagy et al. 2020, section 3.1).

    That marked queries look at all keys is not said here, since they do so through projections of their own:
    see `GlobalAttention`, which tells the view which tokens those are.
    """

    def here(self, view: View) -> Rule:
        return Nobody() if view.marked is None else self

    def among(self, view: View, queries: Tensor, keys: Tensor) -> Tensor | None:
        if view.marked is None:
            return Nobody().among(view, queries, keys)
        return at(view.marked, keys).expand(*[-1] * (as_scores(keys).ndim - 2), as_scores(queries).shape[-2], -1)


def needed(rule: Rule, view: View, size: int) -> Tensor:
    """Return which blocks of `size` keys a block of queries needs: boolean [1 or H, blocks, blocks].

    None is left out in which a query may look at a key, but for what `scattered` tells. Queries are all keys' own.
    """
    if isinstance(rule, Joined):
        join = Tensor.logical_and if isinstance(rule, All) else Tensor.logical_or
        return functools.reduce(join, (needed(one, view, size) for one in rule.rules))
    starts = torch.arange(0, view.keys, size, device=view.device)
    count = len(starts)
    if isinstance(rule, Edges):
        ends = (starts < rule.first * rule.block) | (starts + size > rule.behind(view) * rule.block)
        return (ends[:, None] | ends)[None]
    if rule.grain > 1:
        own = torch.arange(0, view.keys, rule.grain, device=view.device)
        table = rule.among(view, own[None, None, :, None], own[None, None, None, :])
        overlap = ((starts[:, None] < own + rule.grain) & (own < starts[:, None] + size)).float()
        assert table is not None
        return overlap @ table.any(0).float() @ overlap.T > 0
    found = torch.zeros(1, count, count, dtype=torch.bool, device=view.device)
    for i in range(0 if isinstance(rule, Marked) else count):
        run = rule.reach(view, range(i * size, min((i + 1) * size, view.keys)))
        if run:
            found[:, i, run.start // size : -(-run.stop // size)] = True
    return found


def scattered(rule: Rule, view: View) -> Tensor | None:
    """Return the single keys that all queries may look at beside what blocks they need: places [B, n], -1 for none."""
    if view.marked is None or not _speaks_of_marks(rule):
        return None
    count = int(view.marked.sum(1).max())
    first, places = view.marked.int().topk(count, 1)
    return places.masked_fill(first == 0, -1)


def _speaks_of_marks(rule: Rule) -> bool:
    return any(map(_speaks_of_marks, rule.rules)) if isinstance(rule, Joined) else isinstance(rule, Marked)


@functools.lru_cache(maxsize=256)
def _times(rule: RandomBlocks, blocks: int) -> Tensor:
    """Return how many times each block has drawn each: integers [H, blocks, blocks]; those at the ends draw none."""
    found = torch.zeros(rule.heads, blocks, blocks, dtype=torch.long)
    drawn = torch.from_numpy(draw(rule, blocks)).long()
    return found.scatter_add_(2, drawn.clamp(min=0), (drawn >= 0).long())


def draw(rule: RandomBlocks, blocks: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.int32]]:
    """Draw the blocks that each block of a row looks at: [H, blocks, count], -1 where none is left to draw.

    Raises:
        SpecError: the row is longer than the longest, which the old way of drawing can't do.
    """
    chance = np.random.RandomState(rule.seed)
    found = np.full((rule.heads, blocks, rule.count), -1, np.int32)
    if blocks * rule.block in OLD_LENGTHS:
        if blocks * rule.block > rule.longest:
            raise SpecError(f"random blocks for {blocks * rule.block} tokens can't be drawn for {rule.longest} at most")
        whole = rule.longest // rule.block
        for head in range(rule.heads):
            for i in range(1, whole - 1):
                drawn = chance.permutation(_old_choice(rule, i, whole))[: rule.count]
                if i < blocks - 1:
                    found[head, i, : len(drawn)] = drawn
        return found
    among = min(2 * rule.count + 5, blocks)
    for i in range(1, blocks - 1):
        near = {i - 1, i, i + 1, 0, among - 1, {1: among - 2, among - 2: 1}.get(i, i)}
        for head in range(rule.heads):
            free = [one for one in chance.permutation(np.arange(among)) if one not in near][: rule.count]
            found[head, i, : len(free)] = free
    return found


def _old_choice(rule: RandomBlocks, i: int, whole: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return what block i of `whole` may draw in the old way, which lets the last two draw blocks next to them."""
    inner = np.arange(1, whole - 1)
    last = 1024 // rule.block - 1 if 2 * rule.block < 1024 else whole - 1
    if i <= 2:
        return inner[i + 1 : last]
    if i >= whole - 3 or i - 2 > last:
        return inner[:last]
    return inner[: i - 2] if i + 1 == last else np.concatenate((inner[: i - 2], inner[i + 1 : last]))
