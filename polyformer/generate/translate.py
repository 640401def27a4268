"""Texts in, translations out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polyformer.errors import DataError
from polyformer.generate.forests import Text
from polyformer.generate.runner import Counts, Runner
from polyformer.generate.search import positions_of, search, search_slots
from polyformer.generate.settings import Hypothesis, Search, SpecialTokens
from polyformer.parts.model import TransformerPart

if TYPE_CHECKING:
    from polyformer.data.tokenizer import TextPairTokenizer

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Translation:
    """One translation of a text.

    Attributes:
        text: the translation.
        score: what n-best lists are sorted by: log_probability divided by the search's length penalty.
        log_probability: nats, the sum over its tokens, the end token included.
        ids: its tokens as ids, without the end token.
        tokens: its tokens as a person can read them.
    """

    text: str
    score: float
    log_probability: float
    ids: list[int]
    tokens: list[str]

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {
            "text": self.text,
            "score": self.score,
            "log_probability": self.log_probability,
            "tokens": self.tokens,
        }


EMPTY = Translation("", 0.0, 0.0, [], [])
"""The translation of nothing, which no model is asked for."""


def translate(
    model: TransformerPart | Runner,
    tokenizer: TextPairTokenizer,
    texts: Sequence[str],
    settings: Search | None = None,
    target_language: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    counts: Counts | None = None,
) -> list[list[Translation]]:
    """Translate texts, long ones first: in PyTorch together with others of their length, else in a runner's slots.

    Args:
        model: a model, which is run in PyTorch, or what runs one otherwise; the latter forgets what it held.
        texts: one sentence each, or what the model was trained on.
        settings: how to search; `Search()` if None.
        target_language: for models that know several.
        batch_tokens: source tokens times beams in a batch in PyTorch, padding included; one text is always taken.
        progress: called with the number of texts that are newly finished.
        counts: what is done is added to it.
    Returns:
        For each text at most `settings.nbest` translations, best first. A text of white space only has one: "".
    Raises:
        DataError: a text that has more tokens than the model has positions, or that the tokenizer refuses.
        RunError: the model gives scores that are no numbers.
    """
    settings, counts = settings or Search(), counts or Counts()
    report = progress or (lambda count: None)
    found: list[list[Translation]] = [[EMPTY] for _ in texts]
    real = [i for i, text in enumerate(texts) if text.strip()]
    report(len(texts) - len(real))
    encoded = tokenizer.encode_sources([texts[i] for i in real], [target_language] * len(real))
    sources = dict(zip(real, encoded, strict=True))
    special = SpecialTokens(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    if isinstance(model, TransformerPart):
        _refuse_long(positions_of(model.spec.source), sources, texts)  # type: ignore[attr-defined]
        answers = _in_batches(model, sources, settings, special, _Reported(batch_tokens, report, counts))
    else:
        _refuse_long(model.source_positions, sources, texts)
        given = [Text((special.bos,), sources[i]) for i in real]
        answers = dict(zip(real, search_slots(model, given, settings, special, counts, report), strict=True))
    for i, hypotheses in answers.items():
        found[i] = [_translation(tokenizer, one) for one in hypotheses]
        counts.written += len(hypotheses[0].ids) + 1
    return found


class _Reported(NamedTuple):
    """How large batches are, and who is told of them."""

    tokens: int
    progress: Callable[[int], None]
    counts: Counts


def _in_batches(
    model: TransformerPart,
    sources: dict[int, list[int]],
    settings: Search,
    special: SpecialTokens,
    reported: _Reported,
) -> dict[int, list[Hypothesis]]:
    found: dict[int, list[Hypothesis]] = {}
    device = next(model.parameters()).device
    for batch in _by_length(sources, reported.tokens // settings.beams):
        width = max(len(sources[i]) for i in batch)
        rows = [sources[i] + [special.pad] * (width - len(sources[i])) for i in batch]
        mask = [[place < len(sources[i]) for place in range(width)] for i in batch]
        given = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
        found.update(zip(batch, search(model, *given, settings, special, reported.counts), strict=True))
        reported.progress(len(batch))
    return found


def _translation(tokenizer: TextPairTokenizer, one: Hypothesis) -> Translation:
    text, tokens = tokenizer.decode_target(one.ids), tokenizer.target_tokens(one.ids)
    return Translation(text, one.score, one.log_probability, one.ids, tokens)


def _refuse_long(positions: int | None, sources: dict[int, list[int]], texts: Sequence[str]) -> None:
    """Raise if a source is longer than the encoder's positions, before any work is done."""
    for i, ids in sources.items():
        if positions is not None and len(ids) > positions:
            start = texts[i] if len(texts[i]) <= 60 else texts[i][:60] + "…"
            raise DataError(
                f"text {i + 1} has {len(ids)} tokens, but the model has only {positions} positions; "
                f"divide it into sentences: '{start}'"
            )


def _by_length(sources: dict[int, list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest first; each as many as fit, and at least one."""
    batch: list[int] = []
    for i in sorted(sources, key=lambda i: (-len(sources[i]), i)):
        if batch and len(sources[batch[0]]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
