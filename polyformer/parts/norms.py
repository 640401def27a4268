"""Normalisations. Where they stand (pre, post, sandwich) is said by `Residual`'s slots, not here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.parts.contract import Clause, Differs, Term
from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


MOVING: Mapping[Clause, Term] = {"checkpointed": Differs("its running statistics take the batch in a second time")}


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
    """x / sqrt(mean(x²) + eps) · gain over the width (Zhang and Sennrich 2019).

    `offset` is added to the trained gain: Gemma holds the difference from 1.
    """

    gain: bool = True
    offset: float = 0.0

    def module(self) -> Part:
        return RMSNormPart(self)


class BatchNorm(Norm):
    """Normalisation by statistics over the batch's real tokens (Ioffe and Szegedy 2015), for comparison.

    Padding is left out of the statistics unless `masked` is false, which is the mistake that experiments show.
    """

    momentum: float = 0.1
    masked: bool = True

    def breaks(self) -> Mapping[Clause, Term]:
        return MOVING

    def module(self) -> Part:
        return BatchNormPart(self)


class PowerNorm(Norm):
    """x / ψ · gain + bias, where ψ² is the running mean of x² over the real tokens (PN: Shen et al. 2020, section 4).

    A batch's own statistics fluctuate too much on text for `BatchNorm`. Here no mean is subtracted, and both passes
    use running statistics: the backward one in place of what the batch's share in ψ would contribute (algorithm 2).
    In the first `warmup` steps of training, while they are gathered, those of the batch are used, with their exact
    gradient (the paper's PN-V). `momentum` is the paper's 1 - α. The authors scale each row before it, which is
    `Chain((RMSNorm(width, gain=False), PowerNorm(width)))`.
    """

    momentum: float = 0.1
    warmup: int = 4000

    def check(self) -> None:
        super().check()
        self.require(0 < self.momentum <= 1, f"momentum must be in (0, 1], not {self.momentum}")
        self.require(self.warmup >= 0, "warmup can't be negative")

    def breaks(self) -> Mapping[Clause, Term]:
        return MOVING

    def module(self) -> Part:
        return PowerNormPart(self)


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
        self.weight = nn.Parameter(torch.full((spec.width,), 1 - spec.offset)) if spec.gain else None
        self.shape, self.eps, self.offset = (spec.width,), spec.eps, spec.offset

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        if self.weight is None or not self.offset:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        gain = self.offset + self.weight.to(wide)  # in half precision the sum would lose what was trained
        return F.rms_norm(x.to(wide), self.shape, gain, self.eps).to(x.dtype)


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


class PowerNormPart(Part):
    """x [B, S, width] -> the same shape, in the statistics' precision; outside of training ψ stays as it is.

    Attributes:
        running_square: ψ² [width].
        running_slope: the paper's ν [width], the mean of x̂ · ∂L/∂x̂ over tokens as it runs through training.
        steps: how many training passes there were.
    """

    running_square: Tensor
    running_slope: Tensor
    steps: Tensor

    def __init__(self, spec: PowerNorm) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(spec.width))
        self.bias = nn.Parameter(torch.zeros(spec.width))
        self.register_buffer("running_square", torch.ones(spec.width))
        self.register_buffer("running_slope", torch.zeros(spec.width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.eps, self.momentum, self.warmup = spec.eps, spec.momentum, spec.warmup

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        x = x.to(self.running_square.dtype)
        rows = _real_rows(x, flow.rows_valid)
        if self.training and len(rows) > 0:
            self.steps += 1
            square, step = rows.detach().square().mean(0), int(self.steps)
            warm = step <= self.warmup
            scale = torch.rsqrt((square if warm else self.running_square) + self.eps)
            self.running_square.lerp_(square, 1 / step if warm else self.momentum)
            given = (scale, self.running_slope, self.momentum, warm)
            scaled: Tensor = PowerScale.apply(x, flow.rows_valid, *given)  # type: ignore[no-untyped-call]
        else:
            scaled = x * torch.rsqrt(self.running_square + self.eps)
        return scaled * self.weight + self.bias


class PowerScale(torch.autograd.Function):
    """(x [B, S, D], which rows are real [B, S] or None, 1/ψ [D], ν [D], momentum, exact) -> x̂ = x/ψ [B, S, D].

    ∂L/∂x = (∂L/∂x̂ - ν x̂) / ψ, and then ν takes in this batch's mean of x̂ · ∂L/∂x̂ (Shen et al. 2020, algorithm 2).
    Where ψ is the batch's own (`exact`), that mean in place of ν makes it the gradient itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, real: Tensor | None, scale: Tensor, slope: Tensor, momentum: float, exact: bool
    ) -> Tensor:
        scaled: Tensor = x * scale
        ctx.save_for_backward(scaled, real, scale)
        ctx.slope, ctx.momentum, ctx.exact = slope, momentum, exact
        return scaled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, real, scale = ctx.saved_tensors
        rows = _real_rows(scaled, real)
        own, square = (_real_rows(gradient, real) * rows).mean(0), rows.square().mean(0)
        share = (own if ctx.exact else ctx.slope) * scaled
        if real is not None:  # padding has no part in the statistics
            share = share.masked_fill(~real[..., None], 0.0)
        found = (gradient - share) * scale
        ctx.slope.mul_(1 - ctx.momentum * square).add_(own, alpha=ctx.momentum)
        return found, None, None, None, None, None


def _real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """[B, S, D] -> [N, D]."""
    return x.flatten(0, -2) if real is None else x[real]
