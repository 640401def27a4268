"""The likeliest next tokens of each row, found without keeping the scores of a whole batch.

Shape letters: R rows, D width, V vocabulary, C candidates, F forbidden tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyformer.parts.part import Part

CHUNK_BYTES = 30 * 2**20
"""Logits held at a time: just below the 32 MiB from which on glibc maps, and faults in, new memory every time."""

BLOCK = 64
"""Columns that are first looked at together when the best of a row are sought."""


class Candidates(NamedTuple):
    """Next tokens of each row, best first: log-probabilities [R, C] and ids [R, C]."""

    log_probabilities: Tensor
    ids: Tensor


def best_tokens(head: Part, hidden: Tensor, count: int, forbidden: Tensor) -> Candidates:
    """Return the `count` most probable tokens of each row; of equally probable ones those with lower ids.

    Args:
        head: maps [R, D] to logits [R, V].
        hidden: [R, D].
        forbidden: integers [F], ids that come out as impossible. They keep their share of the probability, so that
            the others' log-probabilities are the model's own.
    """
    vocabulary = head(hidden[:0], None).shape[-1]
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    found = [_best_of(head(part, None), min(count, vocabulary), forbidden) for part in torch.split(hidden, rows)]
    return found[0] if len(found) == 1 else Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def best_after(logits: Tensor, count: int, forbidden: Tensor, change: Callable[[Tensor, int], Tensor]) -> Candidates:
    """Return the best tokens after a change of each row's logits [R, V].

    Several candidates are compared with those of other rows, so that their log-probabilities are changed, and count as
    they are then. A single one is chosen by changed logits, and keeps the model's own log-probability. The reference
    library changes the same in its beam and greedy searches.

    Args:
        change: takes the scores [V] of a row, and its number, and returns others.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    likely = logits.log_softmax(-1)
    scores = likely.clone() if count > 1 else logits
    scores[:, forbidden] = float("-inf")
    changed = torch.stack([change(row, i) for i, row in enumerate(scores)])
    values, ids = top(changed, min(count, changed.shape[-1]))
    return Candidates(values if count > 1 else likely.gather(1, ids), ids)


def _best_of(logits: Tensor, count: int, forbidden: Tensor) -> Candidates:
    """Find the candidates and then turn the logits into their normaliser, in place."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    barred = logits[:, forbidden]
    logits[:, forbidden] = float("-inf")
    values, ids = top(logits, count)
    logits[:, forbidden] = barred
    highest = torch.cat((values[:, :1], barred), 1).amax(1, keepdim=True)
    normaliser = logits.sub_(highest).exp_().sum(1, keepdim=True).log_().add_(highest)
    return Candidates(values - normaliser, ids)


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row and their columns, in order; equal ones by column.

    `torch.topk` leaves it open which of several equal numbers it returns. One more than asked for is taken, so that
    a row in which this matters shows: it has neighbours that are equal. Such rows are sorted instead.
    """
    vocabulary = scores.shape[-1]
    more = min(count + 1, vocabulary)
    values, columns = _top_by_blocks(scores, more) if vocabulary > 16 * BLOCK * more else scores.topk(more)
    equal = (values[:, 1:] == values[:, :-1]).any(1)
    values, columns = values[:, :count], columns[:, :count]
    if bool(equal.any()):
        rows = equal.nonzero()[:, 0]
        in_order = scores[rows].sort(dim=1, descending=True, stable=True)
        values[rows], columns[rows] = in_order.values[:, :count], in_order.indices[:, :count]
    return values, columns


def _top_by_blocks(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Do what `topk` does in a quarter of its time: only the blocks with the `count` largest maxima are searched.

    A number outside these is not larger than any of their maxima, which are `count` numbers themselves.
    """
    blocks = scores.shape[-1] // BLOCK
    maxima = scores[:, : blocks * BLOCK].view(len(scores), blocks, BLOCK).amax(2)
    within = torch.arange(BLOCK, device=scores.device)
    columns = (maxima.topk(count).indices[:, :, None] * BLOCK + within).flatten(1)
    rest = torch.arange(blocks * BLOCK, scores.shape[-1], device=scores.device)
    columns = torch.cat((columns, rest.expand(len(scores), -1)), 1)
    values, places = scores.gather(1, columns).topk(count)
    return values, columns.gather(1, places)
