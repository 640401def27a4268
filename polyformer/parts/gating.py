"""gMLP's spatial gating: rows meet in one trained matrix, without attention.

Shape letters: B batch, S rows of this pass, K all rows with those in the cache, D width, E half of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Term
from polyformer.parts.flow import Flow
from polyformer.parts.norms import LayerNorm
from polyformer.parts.part import Part, Slotted, draw_normal
from polyformer.parts.rules import Everyone, Rule
from polyformer.spec import Spec


class SpatialGating(Spec):
    """z₁ · (W norm(z₂) + b), for the halves z₁ and z₂ of a row; W mixes rows (Liu et al. 2021, section 2.1).

    W [length, length] and b [length] are trained, one entry for each pair of places and each place; W starts near 0
    and b at 1, so that a new unit passes z₁ on. `see` says which rows' entries of W count: with `Causal()` it is a
    lower triangle. Padding adds nothing, and places are those in a row's own document.

    Raises:
        SpecError: a sequence longer than `length`.
    """

    norm: Spec
    length: int
    see: Rule = Everyone()

    def check(self) -> None:
        self.require(self.length > 0, "length must be at least 1")

    @classmethod
    def of_width(cls, width: int, length: int, see: Rule) -> SpatialGating:
        """Return the published form for rows of `width`, of which it gives back half; raises for an odd width."""
        if width % 2:
            raise SpecError(f"SpatialGating halves its rows, so their width can't be {width}")
        return cls(LayerNorm(width // 2), length, see)

    def breaks(self) -> Mapping[Clause, Term]:
        return self.see.breaks()

    def module(self) -> Part:
        return SpatialGatingPart(self)


class SpatialGatingPart(Slotted):
    """x [B, S, D] -> [B, S, D / 2]. A cache holds the normed halves of earlier rows."""

    norm: Part

    def __init__(self, spec: SpatialGating) -> None:
        super().__init__(spec)
        self.see, self.length = spec.see, spec.length
        self.weight = nn.Parameter(torch.empty(spec.length, spec.length))
        self.bias = nn.Parameter(torch.ones(spec.length))
        draw_normal(self.weight, 1e-3)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        passed, gate = x.chunk(2, -1)
        return passed * flow.apart(self._gate, self.norm(gate, flow))

    def _gate(self, gate: Tensor, flow: Flow) -> Tensor:
        """Return the mixed halves of rows [B, S, D / 2]."""
        if flow.cache is not None:
            half = gate.shape[-1] // 2
            held = flow.cache.extend(flow.path + self.slot, gate[:, None, :, :half], gate[:, None, :, half:])
            gate = torch.cat(held, -1)[:, 0]
        weight_BSK, bias_BS = self.between(flow)
        return weight_BSK @ gate + bias_BS[..., None]

    def between(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """Return the entries of W for each row of this pass and each that it sees [1 or B, S, K], and those of b."""
        view = flow.view
        places, past = view.places, view.keys - view.queries
        in_order = view.key_documents is None and (view.valid is None or view.right_padded)
        if view.valid is not None and not in_order:
            places = places.masked_fill(~view.valid, 0)  # the places of padding may lie beyond all real ones
        longest = int(places.max()) + 1 if places.numel() else 0
        if longest > self.length:
            raise SpecError(f"SpatialGating: a sequence of {longest} rows is longer than the {self.length} it knows")
        asking = places[:, past:]
        if in_order:  # a slice, whose gradient is cheaper than that of single entries
            weight = self.weight[past : view.keys, : view.keys][None]
        else:
            weight = self.weight[asking[:, :, None], places[:, None, :]]
        mask = view.mask(self.see)
        if mask.causal:
            weight = weight.tril()
        elif mask.allowed is not None:
            weight = weight.masked_fill(~mask.allowed[:, 0], 0.0)
        return weight, self.bias[asking]
