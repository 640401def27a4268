"""Places in rows, as rules and score biases name them (see `polyformer.parts.rules`), and in the documents of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def as_scores(places: Tensor) -> Tensor:
    """Give places [s, 1] or [b, s, 1] (of keys, [1, k] or [b, 1, k]) the dimensions that they are short for."""
    return places if places.ndim > 3 else places[:, None] if places.ndim == 3 else places[None, None]


def at(table_BK: Tensor, places: Tensor) -> Tensor:
    """Look up a fact of the row's places: [b, K] -> [b, h, ..., s, 1] (of keys, [..., 1, k])."""
    places = as_scores(places)
    if len(places) == 1:
        return table_BK[:, places[0]]
    if len(table_BK) == 1:
        return table_BK[0][places]
    return table_BK.gather(1, places.flatten(1)).view(places.shape)


def changes(documents: Tensor) -> Tensor:
    """Tell where an id differs from the one before: [B, K] -> boolean [B, K]."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))


def places_in_documents(documents: Tensor, valid: Tensor | None) -> Tensor:
    """Count from 0 within each run of equal ids, whatever ids padding has: [B, K] -> [B, K]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if valid is not None:
        starts[:, 1:] |= valid[:, 1:] != valid[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values
