"""LoRA beside a frozen matrix as one step: forward and backward in as few passes over the rows as there are products.

Shape letters: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyformer.parts.linear import AffinePart


def joins(base: AffinePart, x: Tensor, a: Tensor) -> bool:
    """Tell whether `LoRAProduct` is what base and LoRA come to: nothing of the base learns, and there is one type."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    frozen = base.bias is None or not (base.bias.requires_grad or base.bias.dtype != x.dtype)
    return frozen and x.dtype == a.dtype and base.frozen(x.dtype)


class LoRAProduct(torch.autograd.Function):
    """(x [..., I], A [R, I], B [O, R], the base, s) -> x Wᵀ + bias + s · x Aᵀ Bᵀ [..., O].

    What LoRA adds is added in place, to the answer and to the gradient of x. Of the rows that go in, only x is kept,
    which the matrices beside this one (queries', keys', values') keep as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: AffinePart, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = base.times(rows)
        if base.bias is not None:
            y += base.bias
        narrow = rows @ a.mT
        y.addmm_(narrow, b.mT, alpha=scale)
        ctx.save_for_backward(rows, narrow, a, b)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, a, b = ctx.saved_tensors
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner = gradient @ b
        of_a = torch.mm(inner.mT, rows).mul_(ctx.scale) if wants_a else None
        of_b = torch.mm(gradient.mT, narrow).mul_(ctx.scale) if wants_b else None
        of_x = ctx.base.times_back(gradient).addmm_(inner, a, alpha=ctx.scale).view(ctx.shape) if wants_x else None
        return of_x, of_a, of_b, None, None
