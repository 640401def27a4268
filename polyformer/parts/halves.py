"""What a row's first separator tells: a question stands before it, and the text that it is asked of behind it.

In a row without that token, the question is the first token alone (so BigBird has it: Zaheer et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.embeddings import Lookup, LookupPart
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow

ROWS: Mapping[Clause, Term] = {
    "cached": Refuses("it must see the separator, which another pass may have read"),
    "packed": Refuses("it looks for one separator in a row, not for one in each document"),
}


class Halves(Lookup):
    """A `Lookup` that has the value 0 up to the first `token` and 1 behind it, where a batch lacks its input."""

    token: int = 0

    def check(self) -> None:
        super().check()
        self.require(self.count > 1, "two halves need two vectors")

    def breaks(self) -> Mapping[Clause, Term]:
        return ROWS

    def module(self) -> Part:
        return HalvesPart(self)


class BehindFirst(Spec):
    """Scores far below all others for tokens up to the first `token`, but for the very first: no answer is there."""

    token: int

    def breaks(self) -> Mapping[Clause, Term]:
        return ROWS

    def module(self) -> Part:
        return BehindFirstPart(self)


class HalvesPart(LookupPart):
    """The rows' values -> [B, S, width]."""

    def __init__(self, spec: Halves) -> None:
        super().__init__(spec)
        self.token = spec.token

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        if self.input in flow.inputs:
            return super().forward(x, flow)
        return F.embedding(behind(flow, self.token).long(), self.weight)


class BehindFirstPart(Part):
    """Scores [B, S, D] -> the same, 10⁶ lower where no answer is looked for."""

    def __init__(self, spec: BehindFirst) -> None:
        super().__init__(spec)
        self.token = spec.token

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        asked = ~behind(flow, self.token) & (flow.view.places != 0)
        return x - 1e6 * asked[..., None].to(x.dtype)


def behind(flow: Flow, token: int) -> Tensor:
    """Return which tokens stand behind the first `token`: boolean [B, S]."""
    ends = flow.inputs["ids"] == token
    if flow.view.valid is not None:
        ends = ends & flow.view.valid
    found = ends.long().cumsum(1) - ends.long() > 0
    return found | (~ends.any(1, keepdim=True) & (flow.view.places != 0))
