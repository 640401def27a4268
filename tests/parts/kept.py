"""How much autograd holds on to."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Bytes of the tensors that are saved for a backward pass, weights left out: now, and at most so far."""

    def __init__(self, module: nn.Module) -> None:
        self.now = self.peak = 0
        self.weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}

    def pack(self, tensor: Tensor) -> _Box:
        box = _Box(tensor.detach())
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self._add(tensor.nbytes)
            weakref.finalize(box, self._add, -tensor.nbytes)
        return box

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


@contextmanager
def kept_by_autograd(module: nn.Module) -> Iterator[Kept]:
    """Count what is saved while the block runs, in backward passes too."""
    kept = Kept(module)
    with saved_tensors_hooks(kept.pack, lambda box: box.tensor):
        yield kept
