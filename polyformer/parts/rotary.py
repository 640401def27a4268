"""Rotary position embedding (RoPE), and the ways in which models stretch it beyond the length they were trained on.

Shape letters: B batch, S length, H heads, E head width, R the rotated part of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from polyformer.parts.contract import Clause, Differs, Term
from polyformer.parts.part import Part
from polyformer.parts.relative import RelativePart, RelativePosition
from polyformer.spec import Record

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Scaling(Record, abstract=True):
    """How the frequencies of RoPE are changed for longer texts."""

    def frequencies(self, rope: Rotary, length: int) -> Tensor:
        """Return the angle a place for each pair [R / 2], for a text of `length` places."""
        raise NotImplementedError

    def strength(self) -> float:
        """Return the factor on turned queries and keys."""
        return 1.0

    def breaks(self) -> Mapping[Clause, Term]:
        """Return what it keeps `Rotary` from holding of the invariance contract."""
        return {}


class Interpolated(Scaling):
    """Places are divided by `factor` (position interpolation: Chen et al. 2023)."""

    factor: float

    def frequencies(self, rope: Rotary, length: int) -> Tensor:
        return rope.plain() / self.factor


class Dynamic(Scaling):
    """The base grows with the text, once that is longer than `trained` ("dynamic NTK").

    Keys that a cache holds keep the turn that they were given, so cached and full passes agree only within `trained`.
    """

    factor: float
    trained: int

    def frequencies(self, rope: Rotary, length: int) -> Tensor:
        stretch = self.factor * max(length, self.trained) / self.trained - (self.factor - 1)
        return rope.plain(rope.base * stretch ** (rope.width / (rope.width - 2)))

    def breaks(self) -> Mapping[Clause, Term]:
        longest = Differs("beyond the trained length, the angles are those for the longest sequence of the batch")
        now = Differs("beyond the trained length, keys keep the angles they were cached with")
        return {
            "padded on the right": longest,
            "padded on the left": longest,
            "packed": longest,
            "cached": now,
        }


class Llama3(Scaling):
    """Slow pairs are divided by `factor`, quick ones kept, those between blended (Llama 3.1: Grattafiori et al. 2024).

    A pair is quick when its wave is shorter than `trained` / `high`, slow when it is longer than `trained` / `low`.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    trained: int = 8192

    def check(self) -> None:
        self.require(self.high > self.low, "high must be greater than low")

    def frequencies(self, rope: Rotary, length: int) -> Tensor:
        plain = rope.plain()
        turns = self.trained * plain / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


class Yarn(Scaling):
    """Pairs that turn often within `trained` places are kept, slow ones divided by `factor` (Peng et al. 2023).

    `fast` and `slow` are numbers of turns between which the two are blended; `whole` rounds the bounds to whole
    pairs, as the authors' code does. `attention` None means 0.1 · ln(factor) + 1 (equation 15).
    """

    factor: float
    trained: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    whole: bool = True

    def frequencies(self, rope: Rotary, length: int) -> Tensor:
        def pair(turns: float) -> float:
            return rope.width * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

        low, high = pair(self.fast), pair(self.slow)
        if self.whole:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.width - 1)
        places = torch.arange(rope.width // 2, dtype=torch.float32, device="cpu")
        stretched = ((places - low) / (high - low or 0.001)).clamp(0, 1)
        plain = rope.plain()
        return plain / self.factor * stretched + plain * (1 - stretched)

    def strength(self) -> float:
        if self.attention is not None:
            return self.attention
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


class Rotary(RelativePosition):
    """Pairs of each query's and key's elements are turned by an angle that grows with the place (Su et al. 2021).

    Scores then depend on distances only. The first `width` elements of a head are turned, the others left (partial
    rotation, as GPT-NeoX has it). `layout` says which elements are pairs: neighbours, as in the paper and GPT-J, or
    one of the first and one of the second half, as in GPT-NeoX and LLaMA.
    """

    width: int
    base: float = 10000.0
    layout: Literal["halves", "interleaved"] = "halves"
    scaling: Scaling | None = None

    def check(self) -> None:
        self.require(self.width > 0 and self.width % 2 == 0, f"width must be even, not {self.width}")

    def breaks(self) -> Mapping[Clause, Term]:
        return {} if self.scaling is None else self.scaling.breaks()

    def plain(self, base: float | None = None) -> Tensor:
        """Return the unscaled angle a place of each pair [R / 2], in float32, as published models were trained with."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device="cpu") / self.width
        found: Tensor = 1.0 / ((self.base if base is None else base) ** exponents)
        return found

    def module(self) -> Part:
        return RotaryPart(self)


class RotaryPart(RelativePart):
    """x [B, H, S, E] -> the same shape, turned by `flow.positions`. Sines are made once a pass for all layers."""

    def __init__(self, spec: Rotary) -> None:
        super().__init__(spec)
        self.width, self.layout = spec.width, spec.layout

    def turn(self, x_BHSE: Tensor, flow: Flow) -> Tensor:
        cos, sin = flow.once(("rotary", self.spec, x_BHSE.dtype), lambda: self._waves(flow, x_BHSE))
        x, rest = x_BHSE[..., : self.width], x_BHSE[..., self.width :]
        if self.layout == "halves":
            first, second = x.chunk(2, -1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        else:
            first, second = x[..., 0::2], x[..., 1::2]
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def _waves(self, flow: Flow, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [1 or B, 1, S, R / 2]."""
        spec = self.spec
        assert isinstance(spec, Rotary)
        scaling = spec.scaling
        if isinstance(scaling, Dynamic) and flow.pieces:  # whose angles are those for each sequence's length
            waves = [self._waves(piece.flow, like) for piece in flow.pieces]
            return torch.cat([cos for cos, _ in waves], 2), torch.cat([sin for _, sin in waves], 2)
        if scaling is None:
            rates, strength = spec.plain(), 1.0
        else:
            rates, strength = scaling.frequencies(spec, _length(flow)), scaling.strength()
        angles = flow.positions[:, None, :, None].float() * rates.to(flow.positions.device)
        return (angles.cos() * strength).to(like.dtype), (angles.sin() * strength).to(like.dtype)


def _length(flow: Flow) -> int:
    return int(flow.positions.max()) + 1 if flow.positions.numel() else 0
