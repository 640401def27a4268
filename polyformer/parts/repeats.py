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
    counts 1 + `drawn.count` times. Where everyone looks at everyone, there is no list.
    """

    base: Rule
    drawn: RandomBlocks

    def breaks(self) -> Mapping[Clause, Term]:
        return {
            "padded on the left": Differs("its first block is the first of the row, where padding stands"),
            "packed": Refuses("its first block is that of the row, not of each document"),
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
            times = self.drawn.count * (as_scores(keys) < self.drawn.block).long()
        listed = self.base.among(self.view, queries, keys)
        times = times + (1 if listed is None else listed.long())
        return times.clamp(min=1).to(self.sources[0].dtype).log()

    @property
    def grain(self) -> int:
        return self.drawn.block
