"""Keys that count more than once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from polyformer.parts.bias import Bias
from polyformer.parts.blocks import RandomBlocks
from polyformer.parts.contract import Clause, Differs, Refuses, Term
from polyformer.parts.part import Part
from polyformer.parts.places import as_scores
from polyformer.parts.relative import RelativePart, RelativePosition
from polyformer.parts.rules import Everyone, Rule

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Repeats(RelativePosition):
    """score += log(times) for a key that a query's list of blocks names so many times.

    BigBird's published models look at lists of blocks, not at sets of them: those of a rule `base`, and behind them
    blocks `drawn` at random. In training, a block may be drawn that is in the list already. Outside of it, as the
    reference library has it, nothing is drawn, and all the random places of the list name the first block, which then
    counts 1 + `drawn.count` times. The first and the last block have no list, nor has any where everyone looks at
    everyone.
    """

    base: Rule
    drawn: RandomBlocks

    def breaks(self) -> Mapping[Clause, Term]:
        moved = "its first and last blocks are those of the row, where padding stands"
        return {
            "padded on the left": Differs(moved),
            "padded on the right": Differs(moved),
            "cached": Refuses("its last block is that of the row, which grows"),
            "packed": Refuses("its first and last blocks are those of the row, not of each document"),
        }

    def module(self) -> Part:
        return RepeatsPart(self)


class RepeatsPart(RelativePart):
    """Has no weights."""

    def __init__(self, spec: Repeats) -> None:
        super().__init__(spec)
        self.base, self.drawn = spec.base, spec.drawn

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias | None:
        base = self.base.here(flow.view)
        if base == Everyone():
            return None
        like = q_BHSE.new_empty(0)
        return ByRepeats(flow.view, (like,), base, self.drawn, self.training)


@dataclass
class ByRepeats(Bias):
    """The logarithm of how many times a list names a key; `sources` only tells the precision."""

    base: Rule
    drawn: RandomBlocks
    training: bool

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.training:
            times = self.drawn.times(self.view, queries, keys)
        else:
            asking, asked = (as_scores(one) // self.drawn.block for one in (queries, keys))
            last = (self.view.keys - 1) // self.drawn.block
            times = self.drawn.count * ((asked == 0) & (asking > 0) & (asking < last)).long()
        listed = self.base.among(self.view, queries, keys)
        times = times + (1 if listed is None else listed.long())
        return times.clamp(min=1).to(self.sources[0].dtype).log()

    @property
    def grain(self) -> int:
        return self.drawn.block
