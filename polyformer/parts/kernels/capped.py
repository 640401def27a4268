"""Softmax attention whose scores are kept within bounds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart, dense_weights
from polyformer.parts.part import Part


class Capped(Kernel):
    """softmax(cap · tanh(scale · q kᵀ / cap) + bias) v (Gemma 2: Gemma Team 2024, section 2).

    `scale` None is 1/√E. PyTorch's attention has no such cap, so all scores [B, H, S, K] are made.
    """

    cap: float
    scale: float | None = None
    dropout: float = 0.0

    def check(self) -> None:
        self.require(self.cap > 0, f"cap must be positive, not {self.cap}")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def module(self) -> Part:
        return CappedPart(self)


class CappedPart(KernelPart):
    """Dense."""

    def __init__(self, spec: Capped) -> None:
        super().__init__(spec)
        self.cap, self.scale, self.dropout = spec.cap, spec.scale, spec.dropout

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, v = qkv
        weights = F.dropout(self.weights(q, k, context).to(v.dtype), self.dropout, self.training)
        batch, heads, length, keys = weights.shape
        grouped = weights.view(batch, k.shape[1], heads // k.shape[1] * length, keys)
        return (grouped @ v).view(batch, heads, length, v.shape[-1])

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        batch, heads, length, width = q.shape
        grouped = q.reshape(batch, k.shape[1], heads // k.shape[1] * length, width)
        scale = width**-0.5 if self.scale is None else self.scale
        scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, length, k.shape[2]) * scale
        return dense_weights(torch.tanh(scores / self.cap) * self.cap, context)
