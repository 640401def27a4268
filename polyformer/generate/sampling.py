"""Continuing texts token by token: the likeliest token each time, or one drawn by chance.

Shape letters: B batch, S length of the prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.errors import RunError, SpecError
from polyformer.generate.search import evaluating, positions_of
from polyformer.parts.caches import cache_for
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record

FIRST_ROOM = 256


class Sampling(Record):
    """How a text is continued.

    Attributes:
        temperature: what scores are divided by before one is drawn; 0 takes the likeliest token.
        top_k: draw among so many likeliest tokens only; None for all.
        top_p: draw among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling: Holtzman
            et al. 2020); None for all.
        limit: how many tokens are written at most.
        seed: of the chance; row i of a call draws from seed + i, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    limit: int = 64
    seed: int = 0

    def check(self) -> None:
        self.require(0 <= self.temperature < 1e6, f"temperature must be 0 or more, not {self.temperature}")
        self.require(self.top_k is None or self.top_k > 0, f"top_k must be at least 1, not {self.top_k}")
        self.require(self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")
        self.require(self.limit > 0, f"limit must be at least 1, not {self.limit}")
        self.require(0 <= self.seed < 2**62, f"seed must be between 0 and 2^62, not {self.seed}")


@dataclass(frozen=True)
class Continuation:
    """What was written after a prompt.

    Attributes:
        ids: without the token that ended it.
        log_probability: nats, the sum over them (and that token) under the model, before temperature and cuts.
        ended: whether the model ended it, or the limit did.
    """

    ids: list[int]
    log_probability: float
    ended: bool


def continue_texts(
    model: TransformerPart, prompts: Sequence[Sequence[int]], settings: Sampling, ends: Sequence[int]
) -> list[Continuation]:
    """Continue prompts with a decoder-only model, all in one batch; each as it would be continued alone.

    Args:
        prompts: ids, each at least one.
        ends: the tokens that end a text.
    Raises:
        SpecError: no decoder-only model, an empty prompt, one that is longer than the model's positions, or an id
            that is not in the vocabulary.
        RunError: scores that are no numbers.
    """
    rows = [_Row(settings, i) for i in range(len(prompts))]
    for ids in stream(model, prompts, settings, rows):
        for row, token in zip(rows, ids, strict=True):
            row.take(token, ends)
        if all(row.ended for row in rows):
            break
    return [Continuation(row.ids, row.log_probability, row.ended) for row in rows]


class _Row:
    """One text as it grows, and its own source of chance."""

    def __init__(self, settings: Sampling, number: int) -> None:
        self.settings = settings
        self.chance = torch.Generator().manual_seed(settings.seed + number)
        self.ids: list[int] = []
        self.log_probability, self.ended = 0.0, False

    def draw(self, logits: Tensor) -> int:
        """Choose the next token by logits [V]."""
        if self.ended:
            return 0
        likely = torch.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), -1)
        if not bool(likely.isfinite().any()):
            raise RunError("the model gives scores that are no numbers; its weights may be damaged")
        token = int(likely.argmax()) if self.settings.temperature == 0 else self._chosen(likely)
        self.log_probability += float(likely[token])
        return token

    def _chosen(self, likely: Tensor) -> int:
        settings = self.settings
        ordered, ids = (likely / settings.temperature).sort(descending=True, stable=True)
        kept = ordered[: settings.top_k]
        chances = torch.softmax(kept.cpu(), -1)
        if settings.top_p is not None:
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= settings.top_p, 0.0)
        return int(ids[int(torch.multinomial(chances, 1, generator=self.chance))])

    def take(self, token: int, ends: Sequence[int]) -> None:
        """Hold a token that was written."""
        if not self.ended:
            self.ended = token in ends
            if not self.ended:
                self.ids.append(token)


def stream(
    model: TransformerPart, prompts: Sequence[Sequence[int]], settings: Sampling, rows: Sequence[_Row]
) -> Iterator[list[int]]:
    """Yield the next token of every row, until the limit; rows that have ended yield 0."""
    if model.encoder is not None or model.head is None:
        raise SpecError("continuing a text needs a decoder-only model with a language model head; this is another")
    ids, mask = _padded(prompts)
    room = _room(model, ids.shape[1], settings.limit)
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    _refuse_unknown(model, ids)
    cache = cache_for(model.spec, min(ids.shape[1] + FIRST_ROOM, ids.shape[1] + room))
    with evaluating(model):
        for step in range(room):
            if cache.length + ids.shape[1] > cache.room:
                cache.enlarge(2 * cache.room)
            hidden = model.decode(ids, None if bool(mask.all()) else mask, None, cache)
            logits = model.head(hidden[:, -1:], None)[:, 0]
            chosen = [row.draw(one) for row, one in zip(rows, logits, strict=True)]
            yield chosen
            if step + 1 < room:
                ids = torch.tensor(chosen, device=device)[:, None]
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad on the left: the last column holds every prompt's last token. -> ids [B, S], mask [B, S]."""
    if not prompts or not all(prompts):
        raise SpecError("each prompt must have at least one token")
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[False] * (length - len(one)) + [True] * len(one) for one in prompts])
    return ids, mask


def _room(model: TransformerPart, length: int, limit: int) -> int:
    """Return how many tokens can be written after `length` ones."""
    positions = positions_of(model.spec.target)  # type: ignore[attr-defined]
    if positions is None:
        return limit
    if length > positions:
        raise SpecError(f"a prompt of {length} tokens is longer than the model's {positions} positions; shorten it")
    return min(limit, positions - length + 1)


def _refuse_unknown(model: TransformerPart, ids: Tensor) -> None:
    from polyformer.parts import TokenEmbedding
    from polyformer.spec import walk

    target = model.spec.target  # type: ignore[attr-defined]
    sizes = [one.vocabulary for _, one in walk(target) if isinstance(one, TokenEmbedding)]
    if sizes and not 0 <= int(ids.min()) <= int(ids.max()) < sizes[0]:
        raise SpecError(f"a prompt has an id outside of the vocabulary of {sizes[0]:,}")
