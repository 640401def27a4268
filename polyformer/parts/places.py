"""Places in rows, as rules and score biases name them (see `polyformer.parts.rules`), and in the documents of a row;
and what rules are lowered to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError

End = Literal["left", "right"]
"""An end of the row."""


@dataclass
class Mask:
    """A rule lowered for one batch.

    Attributes:
        causal: the rule is the plain causal triangle, S == K, and nothing else.
        allowed: boolean [1 or B, 1 or H, S, K], or None where everything is allowed (or `causal` says it all). Rows
            with nothing to look at are opened to every key here, so that no softmax divides by zero.
        empty: boolean [1 or B, 1 or H, S, 1], True for those rows, whose result is zeros; None if there are none.
    """

    causal: bool
    allowed: Tensor | None
    empty: Tensor | None


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


def document_bounds(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last place of each place's document: [B, K] -> two of [B, K]."""
    _, numbers = torch.unique(documents, return_inverse=True)
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(numbers)
    none = torch.zeros(len(numbers), int(numbers.max()) + 1, dtype=places.dtype, device=documents.device)
    first, last = (none.scatter_reduce(1, numbers, places, to, include_self=False) for to in ("amin", "amax"))
    return first.gather(1, numbers), last.gather(1, numbers)


def pieces_of(documents: Tensor, valid: Tensor | None) -> Tensor:
    """Number documents from left to right, each one's padding with it: [B, K] -> [B, K].

    Raises:
        SpecError: a document that doesn't stand in one piece.
    """
    if valid is not None:  # padding may have any number
        places = torch.arange(documents.shape[1], device=documents.device)
        first = valid.int().argmax(1, keepdim=True)
        documents = documents.gather(1, torch.where(valid, places, first).cummax(1).values)
    numbers = changes(documents).cumsum(1)
    if bool((numbers[:, -1:] != changes(documents.sort(1).values).sum(1, keepdim=True)).any()):
        raise SpecError("each packed document must stand in one piece here; rows of another one part one of them")
    return numbers
