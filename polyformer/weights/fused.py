"""Matrices that hold several projections: how queries, keys and values lie in them, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyformer.errors import WeightsError
from polyformer.weights.names import Operation, Tensors


@dataclass(frozen=True)
class SplitHeads(Operation):
    """One tensor of rows q…q k v for each of `groups` key/value heads, cut into all queries, all keys, all values.

    Each group has `queries` query heads and one of keys and of values, each `width` rows. GPT-NeoX and BLOOM have
    one query head to a group; Falcon has several, or one group only (multi-query).
    """

    groups: int
    queries: int
    width: int

    def to_ours(self, tensors: Tensors) -> Tensors:
        (whole,) = tensors
        rows = self.groups * (self.queries + 2) * self.width
        if whole.shape[0] != rows:
            shape = list(whole.shape)
            raise WeightsError(f"a tensor of shape {shape} should have {rows} rows of queries, keys and values")
        by_group = whole.view(self.groups, self.queries + 2, self.width, *whole.shape[1:])
        q, k, v = torch.split(by_group, [self.queries, 1, 1], 1)
        return tuple(one.flatten(0, 2) for one in (q, k, v))

    def to_disk(self, tensors: Tensors) -> Tensors:
        by_group = [one.reshape(self.groups, -1, self.width, *one.shape[1:]) for one in tensors]
        return (torch.cat(by_group, 1).flatten(0, 2),)
