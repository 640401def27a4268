"""Small models whose attention is one of linear cost, and a count of what a computation makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyformer.parts import Attention, CrossAttention, Kernel, LinearAttention, Performer, Retention, Transformer
from polyformer.spec import Record, rewrite
from tests.parts.models import WIDTH, Shape

SHAPE = Shape("learned", "pre", heads=4, groups=2)
HEAD = WIDTH // SHAPE.heads

KERNELS: dict[str, Kernel] = {
    "linear": LinearAttention(chunk=4),
    "performer": Performer(HEAD, 5, chunk=3),
    "performer-relu": Performer(HEAD, 5, "relu", chunk=64),
}


def with_kernel(spec: Transformer, kernel: Kernel) -> Transformer:
    """Put a kernel into every attention."""

    def change(path: str, record: Record) -> Record:
        return record.replace(kernel=kernel) if isinstance(record, Attention | CrossAttention) else record

    return rewrite(spec, change)


def with_retention(spec: Transformer) -> Transformer:
    """Put retention into self-attention's place."""

    def change(path: str, record: Record) -> Record:
        if not isinstance(record, Attention):
            return record
        return Retention.of_width(WIDTH, 2, record.see).replace(decays=(0.5, 0.9), chunk=4)

    return rewrite(spec, change)


class Counting(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made, and those of all; views of others count too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(out) if isinstance(one, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        self.all += sum(sizes)
        return out


def growth(run: Any, length: int) -> tuple[float, float]:
    """Return by what factors the largest tensor and all tensors together grow when the length is doubled."""
    counted = []
    for n in (length, 2 * length):
        with Counting() as counting:
            run(n)
        counted.append(counting)
    return counted[1].largest / counted[0].largest, counted[1].all / counted[0].all


def forward_and_back(part: Any, *inputs: Tensor, **others: Any) -> None:
    """Run a function of tensors and its gradient."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    torch.autograd.grad(part(*leaves, **others).square().sum(), leaves)
