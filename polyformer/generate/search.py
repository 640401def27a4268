"""Greedy and beam search with an encoder–decoder model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.generate.beams import Beams
from polyformer.generate.candidates import best_after, best_tokens
from polyformer.generate.processors import Written, in_order, refuse_unknown
from polyformer.generate.settings import Hypothesis, Search, SpecialTokens
from polyformer.parts.adapters import AfterPrefix
from polyformer.parts.caches import cache_for
from polyformer.parts.model import Memory, TransformerPart
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
    lengths = [r.length for _, r in walk(embed) if isinstance(r, Position | AfterPrefix)] if embed else []
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
        input_ids: [N, T], or [N, P, T] for a model that reads passages.
        attention_mask: of the same shape, non-zero where real; None if all are.
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
        refuse_unknown(settings.processors, vocabulary)
        limits = _limits(model, input_ids, attention_mask, settings)
        forbidden = torch.tensor(barred, device=input_ids.device)
        count = 1 if settings.diverse is None else settings.diverse.groups
        groups = [Group(model, settings.of_a_group, tokens, limits, memory) for _ in range(count)]
        strength = 0.0 if settings.diverse is None else settings.diverse.strength
        while any(group.alive for group in groups):
            taken: dict[int, Counter[int]] = {}
            for group in groups:
                if group.alive:
                    group.step(forbidden, taken, strength)
    if count == 1:
        return groups[0].beams.best
    each = [[one for group in groups for one in group.beams.best[i]] for i in range(len(limits))]
    return [sorted(found, key=lambda one: -one.score)[: settings.nbest] for found in each]


class Group:
    """The hypotheses of one group for all sentences, and their caches. Without diversity, there is one."""

    def __init__(
        self, model: TransformerPart, settings: Search, tokens: SpecialTokens, limits: list[int], memory: Memory
    ) -> None:
        self.model, self.memory = model, memory
        self.chain, self.tokens = in_order(settings.processors), tokens
        self.beams = Beams(settings, tokens, limits, memory.hidden)
        self.cache = cache_for(model.spec, min(FIRST_ROOM, max(limits)))
        self.longest = max(limits)

    @property
    def alive(self) -> bool:
        """Whether any sentence isn't done."""
        return len(self.beams.sentences) > 0

    def step(self, forbidden: Tensor, taken: dict[int, Counter[int]], strength: float) -> None:
        """Continue every hypothesis by one token.

        Args:
            taken: by sentence, what earlier groups have taken in this step; this one's are added.
            strength: what each of those costs.
        """
        beams, cache, head = self.beams, self.cache, self.model.head
        assert head is not None
        if cache.length == cache.room:
            cache.enlarge(min(2 * cache.room, self.longest))
        hidden = self.model.decode(beams.last, None, self.memory, cache)[:, -1]
        if self.chain or any(taken.values()):
            change = self._change(taken, strength)
            step = beams.advance(best_after(head, hidden, beams.candidates, forbidden, change))
        else:
            step = beams.advance(best_tokens(head, hidden, beams.candidates, forbidden))
        if strength:
            for sentence, row in zip(beams.sentences.tolist(), beams.written[:, :, -1].tolist(), strict=True):
                taken.setdefault(sentence, Counter()).update(row)
        if step.sentences is not None:
            self.memory = self.memory.select(step.sentences)
            cache.reorder_memory(step.sentences)
        cache.reorder(step.rows)

    def _change(self, taken: dict[int, Counter[int]], strength: float) -> Callable[[Tensor, int], Tensor]:
        beams = self.beams
        width = beams.log_probabilities.shape[1]
        sentences, written = beams.sentences.tolist(), beams.written.flatten(0, 1).tolist()

        def change(likely: Tensor, row: int) -> Tensor:
            for one in self.chain:
                likely = one.apply(likely, Written((self.tokens.bos,), written[row], (self.tokens.eos,)))
            counts = taken.get(sentences[row // width])
            if not counts:
                return likely
            ids = torch.tensor(list(counts), device=likely.device)
            costs = torch.tensor([strength * times for times in counts.values()], device=likely.device)
            return likely.index_add(0, ids, -costs.to(likely.dtype))

        return change


def _limits(model: TransformerPart, input_ids: Tensor, mask: Tensor | None, settings: Search) -> list[int]:
    """Return the longest hypothesis of each sentence, which the decoder's positions limit too."""
    ids = input_ids.flatten(1)
    sources = [ids.shape[1]] * len(ids) if mask is None else mask.flatten(1).ne(0).sum(1).tolist()
    positions = positions_of(model.spec.target)  # type: ignore[attr-defined]
    wanted = [settings.limit.of(source) for source in sources]
    return wanted if positions is None else [min(one, positions) for one in wanted]
