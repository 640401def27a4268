"""Batches of texts for an encoder, sorted by length so that little is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.generate.search import evaluating, positions_of
from polyformer.parts.model import Output, TransformerPart

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer


BATCH = 32


def batches(rows: Sequence[Sequence[int]], pad: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield which rows, ids [B, S] and mask [B, S], longest rows first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        length = max(len(rows[i]) for i in some)
        ids = torch.tensor([[*rows[i], *[pad] * (length - len(rows[i]))] for i in some], dtype=torch.long)
        mask = torch.tensor([[True] * len(rows[i]) + [False] * (length - len(rows[i])) for i in some])
        yield some, ids, mask


def read_each(
    model: TransformerPart,
    tokenizer: TextTokenizer,
    rows: Sequence[Sequence[int]],
    take: Callable[[Output, Tensor], Tensor],
) -> list[Tensor]:
    """Run encoded texts through a model and take one tensor from each.

    Args:
        rows: ids of each.
        take: gets the output of a batch and its mask [B, S], and returns a tensor whose rows belong to the texts.
    Raises:
        SpecError: a text with more tokens than the model has positions.
    """
    most = positions_of(model.spec.source or model.spec.target)  # type: ignore[attr-defined]
    for row in rows:
        if most is not None and len(row) > most:
            told = f"its {len(row)} tokens are more than the model's {most} positions"
            raise SpecError(f"a text is too long, {told}: {tokenizer.decode(row[:20])}…")
    found: list[Tensor | None] = [None] * len(rows)
    device = next(model.parameters()).device
    with evaluating(model):
        for places, ids, mask in batches(rows, tokenizer.pad_id or 0):
            mask = mask.to(device)
            taken = take(model(input_ids=ids.to(device), attention_mask=mask), mask)
            for place, one in zip(places, taken, strict=True):
                found[place] = one
    return [one for one in found if one is not None]
