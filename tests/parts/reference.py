"""Attention written out loop by loop, from the papers' formulas and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.parts.bias import Bias
from polyformer.parts.places import as_scores

May = Callable[[int, int, int], bool]


def attend(q_BHSE: Tensor, k_BGKE: Tensor, v_BGKE: Tensor, may: May, scale: float | None = None) -> Tensor:
    """Return softmax(scale · q kᵀ) v over the keys with `may(batch, query, key)`; zeros where there are none."""
    batch, heads, queries, width = q_BHSE.shape
    groups, keys = k_BGKE.shape[1:3]
    scale = 1 / math.sqrt(width) if scale is None else scale
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for s in range(queries):
                seen = [j for j in range(keys) if may(b, s, j)]
                scores = [torch.exp(scale * torch.dot(q_BHSE[b, h, s], k_BGKE[b, g, j])) for j in seen]
                mixed = torch.zeros(width, dtype=q_BHSE.dtype)
                for score, j in zip(scores, seen, strict=True):
                    mixed = mixed + score / sum(scores) * v_BGKE[b, g, j]
                rows.append(mixed)
    return torch.stack(rows).view(batch, heads, queries, width)


def normalise(row: list[float], eps: float) -> list[float]:
    """Return (x - mean) / sqrt(variance + eps) of one row."""
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    return [(x - mean) / math.sqrt(variance + eps) for x in row]


@dataclass
class Plain(Bias):
    """A score bias that is a tensor [1 or B, 1 or H, 1 or S, K] itself."""

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        (whole,) = self.sources
        rows = as_scores(queries) - (self.view.keys - self.view.queries)
        places, heads = torch.broadcast_tensors(rows, as_scores(keys))[0], torch.arange(whole.shape[1])
        batch = torch.arange(len(whole)).view(-1, *[1] * (places.ndim - 1))
        return whole[batch, heads.view(-1, *[1] * (places.ndim - 2)), rows * (whole.shape[2] > 1), as_scores(keys)]

    def whole(self) -> Tensor:
        return self.sources[0]
