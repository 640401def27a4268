"""Normalisations. Where they stand (pre, post, sandwich) is said by `Residual`'s slots, not here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Norm(Spec, abstract=True):
    """Any normalisation over rows of width `width`."""

    width: int
    eps: float = 1e-5

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) · gain + bias over the width (Ba et al. 2016), with the biased variance."""

    gain: bool = True
    bias: bool = True

    def module(self) -> Part:
        return LayerNormPart(self)


class RMSNorm(Norm):
    """x / sqrt(mean(x²) + eps) · gain over the width (Zhang and Sennrich 2019)."""

    def module(self) -> Part:
        return RMSNormPart(self)


class BatchNorm(Norm):
    """Normalisation by statistics over the batch's real tokens (Ioffe and Szegedy 2015), for comparison.

    Padding is left out of the statistics unless `masked` is false, which is the mistake that experiments show.
    """

    momentum: float = 0.1
    masked: bool = True

    def module(self) -> Part:
        return BatchNormPart(self)


class LayerNormPart(Part):
    """x [..., width] -> the same shape."""

    def __init__(self, spec: LayerNorm) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(spec.width)) if spec.gain else None
        self.bias = nn.Parameter(torch.zeros(spec.width)) if spec.bias else None
        self.shape, self.eps = (spec.width,), spec.eps

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNormPart(Part):
    """x [..., width] -> the same shape."""

    def __init__(self, spec: RMSNorm) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(spec.width))
        self.shape, self.eps = (spec.width,), spec.eps

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class BatchNormPart(Part):
    """x [B, S, width] -> the same shape, in the statistics' precision; keeps running ones for evaluation."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, spec: BatchNorm) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(spec.width))
        self.bias = nn.Parameter(torch.zeros(spec.width))
        self.register_buffer("running_mean", torch.zeros(spec.width))
        self.register_buffer("running_variance", torch.ones(spec.width))
        self.eps, self.momentum, self.masked = spec.eps, spec.momentum, spec.masked

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        x = x.to(self.running_mean.dtype)
        real = flow.rows_valid if self.masked else None
        rows = x.flatten(0, 1) if real is None else x[real]
        if self.training and len(rows) > 0:
            mean, variance = rows.mean(0), rows.var(0, unbiased=False)
            unbiased = variance.detach() * (len(rows) / max(len(rows) - 1, 1))
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_variance.lerp_(unbiased, self.momentum)
        else:
            mean, variance = self.running_mean, self.running_variance
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
