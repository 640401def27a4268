"""Adam with decoupled weight decay whose moments are held in 8-bit codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from polyformer.shrink.codes import from_bytes, to_bytes

PIECE = 2**20
"""How many elements' moments are numbers at a time, in round numbers."""


class Adam8(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on moments in codes of the dynamic map (Dettmers et al. 2022, section 2).

    Each step makes a piece of the moments numbers, updates them and the weights in 32 bits, and writes codes again. A
    second moment that is above 0 never becomes 0 by that: where its first moment had not been rounded off too, that
    would be divided by nothing but eps.

    Args:
        groups: of parameters, with `weight_decay` each.
        betas, eps: Adam's.
        sizes: of blocks that share a scale, and of the smallest parameter whose moments are held in codes.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float, sizes: tuple[int, int]
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.block, self.least = sizes

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._fresh(parameter))
        state["step"] += 1
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        size = max(PIECE // self.block, 1) * self.block
        for start in range(0, len(weights), size):
            run = slice(start, start + size)
            blocks = slice(start // self.block, -(-(start + size) // self.block))
            moments = [self._read(state, name, run, blocks) for name in ("exp_avg", "exp_avg_sq")]
            _advance(weights[run], gradients[run].float(), moments, (group, float(state["step"])))
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                self._write(state, name, (run, blocks), moment)

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return moments of 0; the code of that is 127 with a sign, and 0 without."""
        made = {"step": torch.zeros((), dtype=torch.float32)}
        count, device = parameter.numel(), parameter.device
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zeros = torch.zeros(count, device=device)
            if count < self.least:
                made[name] = zeros
            else:
                made[name], made[f"{name}_scale"] = to_bytes(zeros, self.block, signed)
        return made

    def _read(self, state: dict[str, Tensor], name: str, run: slice, blocks: slice) -> Tensor:
        codes = state[name][run]
        if codes.dtype != torch.uint8:
            return codes
        return from_bytes(codes, state[f"{name}_scale"][blocks], self.block, name == "exp_avg")

    def _write(self, state: dict[str, Tensor], name: str, where: tuple[slice, slice], moment: Tensor) -> None:
        """Put a piece of a moment back; one in 32 bits was changed where it stands."""
        run, blocks = where
        if state[name].dtype != torch.uint8:
            return
        codes, scales = to_bytes(moment, self.block, name == "exp_avg")
        if name == "exp_avg_sq":
            codes.clamp_(min=1).mul_(moment > 0)
        state[name][run], state[f"{name}_scale"][blocks] = codes, scales


def _advance(weights: Tensor, gradients: Tensor, moments: list[Tensor], settings: tuple[dict[str, Any], float]) -> None:
    """Do a step of AdamW on a piece [n], in place."""
    (group, step), (first, second) = settings, moments
    (beta1, beta2), rate = group["betas"], group["lr"]
    first.lerp_(gradients, 1 - beta1)
    second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    size = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights.mul_(1 - rate * group["weight_decay"])
    weights.add_(first.div(size), alpha=-rate / (1 - beta1**step))
