"""AdamW with decay groups, its moments in 32 bits or in 8, and gradient clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyformer.spec import Record
from polyformer.train.adam8 import Adam8


class AdamW(Record):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), in PyTorch's fused form.

    Matrices decay; biases, gains and embeddings of one dimension don't.
    """

    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    decay: float = 0.01

    def check(self) -> None:
        self.require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "beta1 and beta2 must be in [0, 1)")
        self.require(self.eps > 0 and self.decay >= 0, "eps must be above 0 and decay not negative")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimiser for all parameters that want a gradient."""
        betas = self.beta1, self.beta2
        return torch.optim.AdamW(self.groups(model), lr=0.0, betas=betas, eps=self.eps, fused=True)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the parameters that want a gradient, those that decay apart from the others."""
        wanted = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in wanted if p.ndim >= 2], "weight_decay": self.decay},
            {"params": [p for p in wanted if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


class AdamW8(AdamW):
    """AdamW whose moments are held in 8 bits by blocks (Dettmers et al. 2022): a quarter of their memory.

    A parameter of less than `least` elements keeps its moments in 32 bits, since there is nothing to save.
    """

    block: int = 256
    least: int = 4096

    def check(self) -> None:
        super().check()
        self.require(self.block > 0 and self.least >= 0, "block must be at least 1 and least not negative")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        betas = self.beta1, self.beta2
        return Adam8(self.groups(model), betas, self.eps, (self.block, self.least))


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter name: `"exp_avg/decoder.norm.weight"`."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimiser.state.get(parameter, {}).items()
    }


def restore_optimiser(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` returned."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        optimiser.state[parameter][kind] = value.to(parameter.device, copy=True)


def clip_gradients(model: nn.Module, limit: float | None) -> float:
    """Scale all gradients so that their joint norm is at most `limit`; return the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), limit, norm, foreach=True)
    return float(norm)
