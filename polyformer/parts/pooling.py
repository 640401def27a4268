"""From the rows of a sequence to one vector, and the small steps that heads are made of.

Shape letters: B batch, S length, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.feedforward import ACTIVATIONS, Activation
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from polyformer.parts.flow import Flow


class Pool(Spec, abstract=True):
    """Rows [B, S, D] to one vector a sequence [B, D]; padding is never pooled."""

    def breaks(self) -> Mapping[Clause, Term]:
        return {
            "cached": Refuses("the rows of earlier passes are not held"),
            "packed": Refuses("it gives one vector a row, not one a document"),
        }


class Nth(Pool):
    """The `index`-th real row; 0 is where BERT has its [CLS]."""

    index: int = 0

    def module(self) -> Part:
        return NthPart(self)


class Last(Pool):
    """The last real row: the one that has seen all, in a causal model."""

    def breaks(self) -> Mapping[Clause, Term]:
        return {clause: term for clause, term in super().breaks().items() if clause != "cached"}

    def module(self) -> Part:
        return LastPart(self)


class LastOf(Pool):
    """The row of the last token `token`, as BART and T5 classify by their end token.

    Raises:
        SpecError: a sequence without that token.
    """

    token: int

    def module(self) -> Part:
        return LastOfPart(self)


class Mean(Pool):
    """The mean of the real rows (Reimers and Gurevych 2019); `first` rows before them are left out."""

    first: int = 0

    def module(self) -> Part:
        return MeanPart(self)


class Max(Pool):
    """The greatest value of each element over the real rows."""

    def module(self) -> Part:
        return MaxPart(self)


class Normalise(Spec):
    """x / ‖x‖, so that a dot product is a cosine."""

    def module(self) -> Part:
        return NormalisePart(self)


class Activate(Spec):
    """An activation as a step of its own."""

    activation: Activation

    def module(self) -> Part:
        return ActivatePart(self)


class Scale(Spec):
    """x · by, as where half of a sublayer's output is added (Macaron: Lu et al. 2019)."""

    by: float

    def module(self) -> Part:
        return ScalePart(self)


class Squeeze(Spec):
    """The last dimension, of one value, dropped: rows of one score [B, S, 1] to scores [B, S]."""

    def module(self) -> Part:
        return SqueezePart(self)


class Clip(Spec):
    """Keeps all values within ± `limit`."""

    limit: float

    def check(self) -> None:
        self.require(self.limit > 0, f"limit must be positive, not {self.limit}")

    def module(self) -> Part:
        return ClipPart(self)


class MeanOfHeads(Spec):
    """The mean of what several heads say of the same rows (DeiT's two: Touvron et al. 2021)."""

    heads: tuple[Spec, ...]

    def check(self) -> None:
        self.require(len(self.heads) > 0, "needs at least one head")

    def module(self) -> Part:
        return MeanOfHeadsPart(self)


class PoolPart(Part):
    """x [B, S, D] -> [B, D]."""

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        if not x.shape[1]:
            raise SpecError(f"{type(self.spec).__name__} has no row to take: the sequences are of length 0")
        return self.pool(x, flow.rows_valid, flow)

    def pool(self, x: Tensor, real: Tensor | None, flow: Flow) -> Tensor:
        """Pool the rows of which `real` [B, S] are; None if all are."""
        raise NotImplementedError


class NthPart(PoolPart):
    """x [B, S, D] -> [B, D]."""

    def __init__(self, spec: Nth) -> None:
        super().__init__(spec)
        self.index = spec.index

    def pool(self, x: Tensor, real: Tensor | None, flow: Flow) -> Tensor:
        if real is None:
            return x[:, self.index]
        return x[torch.arange(len(x), device=x.device), real.long().argmax(1) + self.index]


class LastPart(PoolPart):
    """x [B, S, D] -> [B, D]."""

    def pool(self, x: Tensor, real: Tensor | None, flow: Flow) -> Tensor:
        if real is None:
            return x[:, -1]
        places = torch.arange(x.shape[1], device=x.device)
        return x[torch.arange(len(x), device=x.device), (real * places).argmax(1)]


class LastOfPart(PoolPart):
    """x [B, S, D] -> [B, D]."""

    def __init__(self, spec: LastOf) -> None:
        super().__init__(spec)
        self.token = spec.token

    def pool(self, x: Tensor, real: Tensor | None, flow: Flow) -> Tensor:
        ids = flow.inputs.get("ids")
        found = None if ids is None else ids == self.token
        if found is not None and real is not None:
            found = found & real
        if found is None or not bool(found.any(1).all()):
            raise SpecError(f"each sequence must hold the end token {self.token}, by whose row it is judged")
        places = torch.arange(x.shape[1], device=x.device)
        return x[torch.arange(len(x), device=x.device), (found * (places + 1)).argmax(1)]


class MeanPart(PoolPart):
    """x [B, S, D] -> [B, D]; a sequence without a real row gives zeros."""

    def __init__(self, spec: Mean) -> None:
        super().__init__(spec)
        self.first = spec.first

    def pool(self, x: Tensor, real: Tensor | None, flow: Flow) -> Tensor:
        if real is None:
            return x[:, self.first :].mean(1)
        kept = (real & (real.cumsum(1) > self.first))[..., None].to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)


class MaxPart(PoolPart):
    """x [B, S, D] -> [B, D]."""

    def pool(self, x: Tensor, real: Tensor | None, flow: Flow) -> Tensor:
        return (x if real is None else x.masked_fill(~real[..., None], -1e9)).amax(1)


class NormalisePart(Part):
    """x [..., D] -> the same shape."""

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return F.normalize(x, dim=-1)


class ActivatePart(Part):
    """x -> the same shape."""

    def __init__(self, spec: Activate) -> None:
        super().__init__(spec)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return self.activation(x)


class ScalePart(Part):
    """x -> the same shape."""

    def __init__(self, spec: Scale) -> None:
        super().__init__(spec)
        self.by = spec.by

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return x * self.by


class SqueezePart(Part):
    """x [..., 1] -> [...]."""

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return x.squeeze(-1)


class ClipPart(Part):
    """x -> the same shape."""

    def __init__(self, spec: Clip) -> None:
        super().__init__(spec)
        self.limit = spec.limit

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return x.clamp(-self.limit, self.limit)


class MeanOfHeadsPart(Part):
    """x -> what the heads make of it."""

    heads: nn.ModuleList

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return torch.stack([head(x, flow) for head in self.heads]).mean(0)
