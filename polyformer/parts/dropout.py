"""Dropout, and a fast source of its random masks on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Dropout(Spec):
    """In training, zero each element with probability `rate` and scale the rest by 1 / (1 - rate)."""

    rate: float

    def check(self) -> None:
        self.require(0 <= self.rate < 1, f"rate must be in [0, 1), not {self.rate}")

    def module(self) -> Part:
        return DropoutPart(self)


class DropPath(Spec):
    """In training, zero a sample's whole branch with probability `rate` and scale the rest by 1 / (1 - rate).

    Stochastic depth (Huang et al. 2016): stands in a `Residual`'s `post`.
    """

    rate: float

    def check(self) -> None:
        self.require(0 <= self.rate < 1, f"rate must be in [0, 1), not {self.rate}")

    def module(self) -> Part:
        return DropPathPart(self)


class DropoutPart(Part):
    """x -> the same shape; nothing in evaluation."""

    def __init__(self, spec: Dropout) -> None:
        super().__init__(spec)
        self.rate = spec.rate

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        return x * keep_mask(x, self.rate)


class DropPathPart(Part):
    """x [B, ...] -> the same shape; nothing in evaluation."""

    def __init__(self, spec: DropPath) -> None:
        super().__init__(spec)
        self.rate = spec.rate

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand((len(x), *[1] * (x.ndim - 1)), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)


def keep_mask(like: Tensor, rate: float, seed: tuple[int, ...] | None = None) -> Tensor:
    """Return a mask of 0 and 1/(1 - rate) of the shape and dtype of `like`.

    PyTorch draws a CPU mask one element at a time from a Mersenne twister, at several nanoseconds each: more than
    the matrix products of a small model need. Here one seed is drawn from PyTorch's generator, so that seeds,
    resuming and recomputation stay under its control, and 16 bits per element come from a small counter-free
    generator (SFC64) in bulk. The rate is thereby rounded to 1/65536, and the scale is that of the rounded rate,
    so that the mask's mean is exactly 1.

    Args:
        seed: numbers of at least 0 that make the same mask again; None draws one.
    """
    threshold = min(round(rate * 65536), 65535)
    words = np.random.SFC64(seed or int(torch.randint(2**62, ()))).random_raw(-(-like.numel() // 4))
    bits = torch.from_numpy(words.view(np.int16))[: like.numel()].to(like.device)
    keep: Tensor = bits.view(like.shape) >= threshold - 32768
    return keep.to(like.dtype).mul_(65536 / (65536 - threshold))
