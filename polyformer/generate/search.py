"""Greedy and beam search with an encoder–decoder model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.generate.beams import Beams
from polyformer.generate.candidates import best_tokens
from polyformer.generate.settings import Hypothesis, Search, SpecialTokens
from polyformer.parts.caches import cache_for
from polyformer.parts.model import TransformerPart
from polyformer.parts.positions import Position
from polyformer.spec import Record, walk

FIRST_ROOM = 32
"""Tokens that a cache has room for at first; few answers come near their limit."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and its like off, and gradients too; put a model that was being trained back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def positions_of(embed: Record | None) -> int | None:
    """Return how many positions an embedding has; None if any number."""
    lengths = [r.length for _, r in walk(embed) if isinstance(r, Position)] if embed else []
    return min((length for length in lengths if length is not None), default=None)


def search(
    model: TransformerPart,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: Search,
    tokens: SpecialTokens,
) -> list[list[Hypothesis]]:
    """Find the best outputs of each sentence of a batch.

    The memory's keys and values are held once to a sentence, self-attention's once to a live hypothesis. A
    sentence that is done leaves the batch, so that no work is spent on it. A sentence's answer doesn't depend on
    its company, beyond the rounding of sums.

    Args:
        input_ids: [N, T].
        attention_mask: [N, T], non-zero where real; None if all are.
        settings: what to search, and for how long.
        tokens: the target side's special tokens.
    Returns:
        For each sentence at most `settings.nbest` distinct hypotheses, best first.
    Raises:
        SpecError: a model without encoder, decoder or head; a source longer than its positions; a special or
            forbidden token, or a first one, that is not in its vocabulary.
        RunError: the model gives scores that are no numbers.
    """
    head = model.head
    if model.encoder is None or model.decoder is None or head is None:
        raise SpecError("searching for an output needs an encoder, a decoder and a head; this model lacks one")
    barred = sorted({tokens.bos, tokens.pad, *settings.forbidden} - {tokens.eos})
    with evaluating(model):
        memory = model.encode(input_ids, attention_mask)
        vocabulary = head(memory.hidden[0, :0], None).shape[-1]
        for token in (*barred, tokens.eos, tokens.eos if settings.first is None else settings.first):
            if not 0 <= token < vocabulary:
                raise SpecError(f"there is no token {token} in a vocabulary of {vocabulary:,}")
        beams = Beams(settings, tokens, _limits(model, input_ids, attention_mask, settings), memory.hidden)
        forbidden = torch.tensor(barred, device=input_ids.device)
        cache = cache_for(model.spec, min(FIRST_ROOM, int(beams.limits.max())))
        while len(beams.sentences):
            if cache.length == cache.room:
                cache.enlarge(min(2 * cache.room, int(beams.limits.max())))
            hidden = model.decode(beams.last, None, memory, cache)
            step = beams.advance(best_tokens(head, hidden[:, -1], beams.candidates, forbidden))
            if step.sentences is not None:
                memory = memory.select(step.sentences)
                cache.reorder_memory(step.sentences)
            cache.reorder(step.rows)
    return beams.best


def _limits(model: TransformerPart, input_ids: Tensor, mask: Tensor | None, settings: Search) -> list[int]:
    """Return the longest hypothesis of each sentence, which the decoder's positions limit too."""
    rows, length = input_ids.shape
    sources = [length] * rows if mask is None else mask.ne(0).sum(1).tolist()
    positions = positions_of(model.spec.target)  # type: ignore[attr-defined]
    wanted = [settings.limit.of(source) for source in sources]
    return wanted if positions is None else [min(one, positions) for one in wanted]
