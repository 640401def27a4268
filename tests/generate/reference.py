"""Beam search written as plainly as possible: one sentence, no cache, no early stopping, lists of numbers."""

from __future__ import annotations

from torch import Tensor

from polyformer.generate import Search
from polyformer.parts.model import TransformerPart
from tests.generate.models import BOS, EOS, PAD

Scored = tuple[float, list[int]]


def log_probabilities(model: TransformerPart, source: Tensor, written: list[int]) -> list[float]:
    """Return the log-probability of each next token, everything computed anew; source [T]."""
    logits = model(source[None], decoder_input_ids=source.new_tensor([[BOS, *written]])).logits
    assert logits is not None
    return [float(x) for x in logits[0, -1].double().log_softmax(-1)]


def beam_search(model: TransformerPart, source: Tensor, settings: Search) -> list[Scored]:
    """Return (score, ids) of the n best, running to the limit whatever is found on the way."""
    beams, limit = settings.beams, settings.limit.of(len(source))
    forbidden = {PAD, BOS, *settings.forbidden}
    live: list[Scored] = [(0.0, [])]
    finished: list[Scored] = []
    for length in range(1, limit + 1):
        following = [
            (total + more, [*ids, token])
            for total, ids in live
            for token, more in enumerate(log_probabilities(model, source, ids))
            if token not in forbidden
        ]
        following = sorted(following, key=lambda one: -one[0])[: 2 * beams if beams > 1 else 1]
        for total, ids in following[:beams]:
            if ids[-1] == EOS or length == limit:
                whole = ids[:-1] if ids[-1] == EOS else ids
                finished.append((total / settings.penalty.divisor(length), whole))
        live = [one for one in following if one[1][-1] != EOS][:beams]
    return sorted(finished, key=lambda one: -one[0])[: settings.nbest]
