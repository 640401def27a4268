"""Exact softmax attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart, dense_weights
from polyformer.parts.part import Part


@contextmanager
def exact_on_cpu(q: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the conversion of q, k and v that attention on this device wants in training, with autocast off.

    PyTorch's CPU attention takes 5-10 times as long in bfloat16 as in float32 in its backward pass (measured for
    16-512 keys, even where bfloat16 products are 7 times as fast), so half-width inputs are widened there.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32 or q.dtype == torch.float64 or not torch.is_grad_enabled():
        yield lambda x: x
        return
    with torch.autocast("cpu", enabled=False):
        yield Tensor.float


class Softmax(Kernel):
    """softmax(scale · q kᵀ + bias) v over the keys that the rule allows (Vaswani et al. 2017, section 3.2.1).

    `scale` None is 1/√E. `dropout` drops attention weights in training; the 2017 paper has none there.
    """

    scale: float | None = None
    dropout: float = 0.0

    def check(self) -> None:
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def module(self) -> Part:
        return SoftmaxPart(self, self.scale, self.dropout)


class SoftmaxPart(KernelPart):
    """SDPA chooses the implementation; the masks are shared by all layers of a pass."""

    def __init__(self, spec: Kernel, scale: float | None, dropout: float) -> None:
        super().__init__(spec)
        self.scale, self.dropout = scale, dropout

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, v = qkv
        mask = context.view.mask(context.rule)
        allowed, causal = mask.allowed, mask.causal
        with exact_on_cpu(q) as widen:
            if context.bias is not None:
                allowed, causal = widen(context.view.biased(context.rule, context.bias.whole())), False
            out = F.scaled_dot_product_attention(
                widen(q),
                widen(k),
                widen(v),
                attn_mask=allowed,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        out = out.to(q.dtype)
        return out if mask.empty is None else out.masked_fill(mask.empty, 0.0)

    def weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return dense_weights(q @ k.transpose(-1, -2) * scale, context)
