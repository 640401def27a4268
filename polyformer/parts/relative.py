"""Positions inside attention: what turns queries and keys, or adds to their scores, by how far apart they stand.

Shape letters: B batch, S query length, K key length, H heads, G key/value heads, E head width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from polyformer.parts.bias import Bias, ByDistance, ByKey, ByProduct, ByVector
from polyformer.parts.linear import Linear
from polyformer.parts.part import Part, draw_normal
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class RelativePosition(Spec, abstract=True):
    """How an attention knows the order of its keys. Any of them can stand in any self-attention."""


class RelativePart(Part):
    """A position scheme turns queries and keys, or biases scores, or both."""

    def turn(self, x_BHSE: Tensor, flow: Flow) -> Tensor:
        """Turn keys that have not been cached yet by their own places, and queries by theirs."""
        return x_BHSE

    def ask(self, q_BHSE: Tensor, flow: Flow) -> Tensor:
        """Turn queries, where that differs from turning keys."""
        return self.turn(q_BHSE, flow)

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias | None:
        """Return what is added to the scores, which kernels ask for whole or block by block, or None."""
        return None


class Alibi(RelativePosition):
    """score -= slope · distance, with one fixed slope to a head (Press et al. 2022, section 3).

    The slopes are 2^(-steepest · i / heads) for i = 1 … heads; where `heads` is no power of two, those of the power
    below it come first, and between them the missing ones are taken from the power above it, as the authors' code does.

    `scale` multiplies all of it. In the `precision` "bfloat16" it is slope · place that is added, with each of the two
    and their product rounded; a model that was trained so, as Falcon, has learned the steps which that makes.
    """

    heads: int
    steepest: float = 8.0
    scale: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        self.require(self.heads > 0, "heads must be at least 1")

    def slopes(self) -> list[float]:
        """Return the slope of each head."""
        below = 2 ** int(math.log2(self.heads))
        first = [2.0 ** (-self.steepest * i / below) for i in range(1, below + 1)]
        between = [2.0 ** (-self.steepest * i / (2 * below)) for i in range(1, 2 * below + 1, 2)]
        return first + between[: self.heads - below]

    def module(self) -> Part:
        return AlibiPart(self)


class Buckets(RelativePosition):
    """A trained scalar for each head and bucket of distances, added to the scores (Raffel et al. 2020, section 2.1).

    Half of the buckets (a quarter to each side, where keys behind the query are seen too) hold one distance each,
    the others grow logarithmically up to `distance`; all beyond share the last.
    """

    heads: int
    count: int = 32
    distance: int = 128
    two_sided: bool = True

    def check(self) -> None:
        fine = self.count // (4 if self.two_sided else 2)
        self.require(fine > 0, f"{self.count} buckets are too few")
        self.require(self.distance > fine, f"a distance of {self.distance} is within the {fine} exact buckets")

    def module(self) -> Part:
        return BucketsPart(self)


class Shaw(RelativePosition):
    """A trained vector for each distance up to `distance` is added to the keys (Shaw et al. 2018, equation 4).

    The vectors that the paper adds to the values as well are left out: it found that they change nothing
    (section 4.3, table 3), and without them every exact kernel can be used.
    """

    width: int
    distance: int = 16

    def check(self) -> None:
        self.require(self.width > 0 and self.distance > 0, "width and distance must be at least 1")

    def module(self) -> Part:
        return ShawPart(self)


class TransformerXL(RelativePosition):
    """score = ((q + u) kᵀ + (q + v) (W r)ᵀ) / √E, where r holds the sinusoids of the distance between query and key.

    u and v are trained vectors of each head (Dai et al. 2019, section 3.3); `width` is that of r, `head_width` E.
    """

    heads: int
    head_width: int
    width: int
    project: Spec

    @classmethod
    def of_width(cls, width: int, heads: int) -> TransformerXL:
        """Return the published form for a model's width."""
        return cls(heads, width // heads, width, Linear(width, width // heads * heads, bias=False))

    def check(self) -> None:
        self.require(min(self.heads, self.head_width, self.width) > 0, "heads and widths must be at least 1")
        self.require(self.width % 2 == 0, f"width must be even, not {self.width}")

    def module(self) -> Part:
        return TransformerXLPart(self)


class Turned(Spec):
    """Rows turned by their places before they are projected, in pieces of the heads' width (Wav2Vec2-Conformer).

    `q=Chain((Turned(Rotary(head_width), heads), Linear(...)))`, and `k` alike; elsewhere, projections are turned.
    """

    position: RelativePosition
    heads: int

    def check(self) -> None:
        self.require(self.heads > 0, "heads must be at least 1")

    def module(self) -> Part:
        return TurnedPart(self)


def distances(flow: Flow) -> Tensor:
    """Return all that key place - query place can be in this pass, from the least: integers [S + K - 1]."""
    view = flow.view
    least = 1 - view.keys
    return torch.arange(least, max(view.queries, least), device=view.device)


class AlibiPart(RelativePart):
    """No weights."""

    def __init__(self, spec: Alibi) -> None:
        super().__init__(spec)
        self.slopes, self.scale, self.precision = spec.slopes(), spec.scale, spec.precision

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias:
        def make() -> Bias:
            slopes = torch.tensor(self.slopes, dtype=torch.float32, device=q_BHSE.device)[:, None]
            if self.precision == "bfloat16":
                risen = slopes.bfloat16() * flow.view.places[:, None].bfloat16()
                return ByKey(flow.view, (risen.to(q_BHSE.dtype) * self.scale,))
            return ByDistance(flow.view, ((-self.scale * slopes * distances(flow).abs()).to(q_BHSE.dtype),))

        return flow.once(("alibi", self.spec, q_BHSE.dtype), make)


class BucketsPart(RelativePart):
    """Holds the table [buckets, heads]. Layers whose tables are tied share one bias in a pass."""

    def __init__(self, spec: Buckets) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.count, spec.heads))
        draw_normal(self.weight, 0.02)

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias:
        def make() -> Bias:
            return ByDistance(flow.view, (self.weight[self._bucket(distances(flow))].T.to(q_BHSE.dtype),))

        return flow.once(("buckets", id(self.weight), self.spec, q_BHSE.dtype), make)

    def _bucket(self, apart: Tensor) -> Tensor:
        spec = self.spec
        assert isinstance(spec, Buckets)
        count = spec.count // 2 if spec.two_sided else spec.count
        behind = (apart > 0) * count if spec.two_sided else torch.zeros_like(apart)
        away = apart.abs() if spec.two_sided else (-apart).clamp(min=0)
        fine = count // 2
        share = (away.clamp(min=fine).float() / fine).log() / math.log(spec.distance / fine)
        coarse = (fine + (share * (count - fine)).long()).clamp(max=count - 1)
        return behind + torch.where(away < fine, away, coarse)


class ShawPart(RelativePart):
    """Holds the table [2·distance + 1, width]; all heads share it."""

    def __init__(self, spec: Shaw) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(2 * spec.distance + 1, spec.width))
        self.distance = spec.distance
        draw_normal(self.weight, 0.02)

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias:
        scores = q_BHSE @ self.weight.to(q_BHSE.dtype).T * q_BHSE.shape[-1] ** -0.5
        return ByVector(flow.view, (scores,), self.distance)


class TransformerXLPart(RelativePart):
    """Holds u and v, each [heads, head_width], and the projection of the sinusoids."""

    project: Part

    def __init__(self, spec: TransformerXL) -> None:
        super().__init__(spec)
        self.content = nn.Parameter(torch.empty(spec.heads, spec.head_width))
        self.distance = nn.Parameter(torch.empty(spec.heads, spec.head_width))
        for one in (self.content, self.distance):
            draw_normal(one, (2 / (spec.heads + spec.head_width)) ** 0.5)
        self.width = spec.width

    def ask(self, q_BHSE: Tensor, flow: Flow) -> Tensor:
        return q_BHSE + self.content[:, None]

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias:
        waves = flow.once(("sinusoids of distances", self.width), lambda: self._waves(flow))
        keys_NHE = self.project(waves.to(q_BHSE.dtype), flow).view(len(waves), *self.content.shape)
        queries = q_BHSE + (self.distance - self.content)[:, None]  # u is in them already
        return ByProduct(flow.view, (queries * q_BHSE.shape[-1] ** -0.5, keys_NHE.transpose(0, 1)))

    def _waves(self, flow: Flow) -> Tensor:
        """Return sines and cosines in turn of query place - key place, from the furthest key behind: [N, width]."""
        rates = torch.arange(0, self.width, 2, dtype=torch.float64, device="cpu") * (-math.log(10000.0) / self.width)
        angles = -distances(flow).cpu().double()[:, None] * rates.exp()
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).float().to(flow.view.device)


class TurnedPart(Part):
    """x [B, S, heads · E] -> the same shape."""

    position: RelativePart

    def __init__(self, spec: Turned) -> None:
        super().__init__(spec)
        self.heads = spec.heads

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        pieces = torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)
        return self.position.turn(pieces, flow).transpose(1, 2).flatten(2)
