"""How far apart the answers of two models are on the same inputs.

Shape letters: B batch, S length, N rows compared, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import DataError, SpecError
from polyformer.generate.search import evaluating
from polyformer.parts.heads import LMHeadPart
from polyformer.parts.model import TransformerPart

CHUNK_BYTES = 16 * 2**20

Inputs = Tensor | Mapping[str, Tensor]
"""A batch of token ids [B, S], or all that a model's `forward` takes, by name."""


@dataclass(frozen=True)
class Difference:
    """The first place where the likeliest token differs: the sequence and the place in it, counted from 0 without
    padding, and the token that each model would choose there."""

    sequence: int
    position: int
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Drift:
    """How far apart two models are, over all real rows of the inputs.

    Attributes:
        rows: how many were compared: real tokens, or sequences where there is one answer to each.
        largest: the largest absolute difference of two logits; of two elements of hidden rows if a model has none.
        divergence: mean KL(a ‖ b) of the distributions over tokens, in nats a row; None without logits.
        same: share of rows where the likeliest token is the same; None without logits.
        first: the first row where it is not; None if there is none.
        cosine: mean cosine of hidden rows; None where logits were compared.
    """

    rows: int
    largest: float
    divergence: float | None = None
    same: float | None = None
    first: Difference | None = None
    cosine: float | None = None

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON; what was not measured is left out."""
        first = self.first
        told = None if first is None else {**vars(first), "tokens": list(first.tokens)}
        return {name: value for name, value in {**vars(self), "first": told}.items() if value is not None}

    def __str__(self) -> str:
        if self.cosine is not None:
            return f"{self.rows:,} hidden rows: largest difference {self.largest:.3g}, mean cosine {self.cosine:.6f}"
        lines = [f"{self.rows:,} rows: largest logit difference {self.largest:.3g}"]
        lines.append(f"KL divergence {self.divergence:.3g} nats a row, same likeliest token in {self.same:.2%}")
        if self.first is not None:
            place = f"sequence {self.first.sequence}, position {self.first.position}"
            lines.append(f"first different token: {place}: {self.first.tokens[0]} and {self.first.tokens[1]}")
        return "\n".join(lines)


def drift(a: TransformerPart, b: TransformerPart, inputs: Iterable[Inputs]) -> Drift:
    """Compare two models on the same inputs, without dropout.

    Where both have a head, their logits are compared, otherwise their hidden rows. Inputs are read batch by batch,
    and logits over a vocabulary are made for a few rows at a time. For encoder–decoder models the inputs hold the
    targets so far, as `decoder_input_ids`.

    Args:
        inputs: batches, any number of them; see `batches_of` for texts.
    Raises:
        SpecError: answers of different widths, inputs that a model can't take, or answers that are no numbers.
        DataError: no real row.
    """
    scored = a.head is not None and b.head is not None
    tally = _Scores() if scored else _Hidden()
    before = 0
    with evaluating(a), evaluating(b):
        for batch in inputs:
            given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            answers = _read(a, given, scored), _read(b, given, scored)
            _compare(*answers, tally, before)
            before += len(answers[0].real)
    if not tally.rows:
        raise DataError("there are no inputs to compare the models on")
    return tally.result()


def batches_of(
    texts: Iterable[str], encode: Callable[[str], Sequence[int]], size: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Yield texts as inputs of a model that reads one sequence, `size` at a time, in their order.

    Args:
        encode: from a text to token ids, such as a tokenizer's method.
    Raises:
        DataError: a text without tokens.
    """
    rows = iter(enumerate(texts, 1))
    while some := list(itertools.islice(rows, size)):
        ids = [torch.tensor(encode(text), dtype=torch.long) for _, text in some]
        empty = [number for (number, _), one in zip(some, ids, strict=True) if not len(one)]
        if empty:
            raise DataError(f"text {empty[0]} has no tokens")
        real = [torch.ones(len(one), dtype=torch.bool) for one in ids]
        padded = [torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for column in (ids, real)]
        yield {"input_ids": padded[0], "attention_mask": padded[1]}


@dataclass
class _Answer:
    """What a model says to a batch: rows [B, S, D or V], which are real [B, S], and what makes scores of rows."""

    rows: Tensor
    real: Tensor
    scores: Callable[[Tensor], Tensor]


def _read(model: TransformerPart, given: Mapping[str, Tensor], scored: bool) -> _Answer:
    """Run a model, without its head if that gives a score to each word of a vocabulary."""
    device = next(model.parameters()).device
    given = {name: tensor.to(device) for name, tensor in given.items()}
    head = model.head
    if scored and not isinstance(head, LMHeadPart):
        rows, scores = model(**given).logits, _as_they_are
        assert rows is not None
    else:
        with _headless(model):
            rows = model(**given).hidden
        scores = head if scored and head is not None else _as_they_are
    rows = rows if rows.ndim == 3 else rows[:, None]
    mask = given.get("attention_mask" if model.encoder is None or model.decoder is None else "decoder_attention_mask")
    fits = mask is not None and mask.shape == rows.shape[:2]
    real = mask.bool() if fits and mask is not None else torch.ones(rows.shape[:2], dtype=torch.bool, device=device)
    return _Answer(rows, real, scores)


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


@contextmanager
def _headless(model: TransformerPart) -> Iterator[None]:
    """Take a model's head off for a while, so that it makes no logits of a whole batch."""
    head, model.head = model.head, None
    try:
        yield
    finally:
        model.head = head


def _compare(a: _Answer, b: _Answer, tally: _Tally, before: int) -> None:
    """Add a batch to a tally, a few rows at a time; `before` is the number of sequences that came earlier."""
    if a.rows.shape[:2] != b.rows.shape[:2]:
        shapes = f"{list(a.rows.shape[:2])} and {list(b.rows.shape[:2])}"
        raise SpecError(f"the models make rows of different numbers, {shapes}, of the same inputs")
    widths = [answer.scores(answer.rows[:0, 0]).shape[-1] for answer in (a, b)]
    if widths[0] != widths[1]:
        raise SpecError(f"answers of {widths[0]} and of {widths[1]} values can't be compared")
    numbers = torch.arange(before, before + len(a.real), device=a.real.device)
    places = torch.stack((numbers[:, None].expand_as(a.real), a.real.long().cumsum(1) - 1), -1)[a.real]
    size = max(1, CHUNK_BYTES // (8 * widths[0]))
    pieces = [torch.split(answer.rows[answer.real.to(answer.rows.device)], size) for answer in (a, b)]
    for one, other, where in zip(*pieces, torch.split(places, size), strict=True):
        tally.add(a.scores(one).double(), b.scores(other).to(one.device).double(), where)


@dataclass
class _Tally:
    """Sums over rows."""

    rows: int = 0
    largest: float = 0.0

    def add(self, a: Tensor, b: Tensor, places: Tensor) -> None:
        """Add rows [N, V] of both models; `places` [N, 2] are their sequences and positions."""
        if not len(a):
            return
        largest = float((a - b).abs().max())
        if not math.isfinite(largest):
            raise SpecError("a model's answers are no numbers; its weights may be damaged")
        self.rows += len(a)
        self.largest = max(self.largest, largest)

    def result(self) -> Drift:
        """Return the means."""
        raise NotImplementedError


@dataclass
class _Scores(_Tally):
    """Of logits."""

    divergence: float = 0.0
    same: int = 0
    first: Difference | None = None

    def add(self, a: Tensor, b: Tensor, places: Tensor) -> None:
        super().add(a, b, places)
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        self.divergence += float((p.exp() * (p - q)).sum(-1).clamp(min=0).sum())  # rounding can go below 0
        tops = a.argmax(-1), b.argmax(-1)
        other = (tops[0] != tops[1]).nonzero()[:, 0]
        self.same += len(a) - len(other)
        if len(other) and self.first is None:
            i = int(other[0])
            sequence, position = places[i].tolist()
            self.first = Difference(sequence, position, (int(tops[0][i]), int(tops[1][i])))

    def result(self) -> Drift:
        return Drift(self.rows, self.largest, self.divergence / self.rows, self.same / self.rows, self.first)


@dataclass
class _Hidden(_Tally):
    """Of hidden rows."""

    cosine: float = 0.0

    def add(self, a: Tensor, b: Tensor, places: Tensor) -> None:
        super().add(a, b, places)
        self.cosine += float(F.cosine_similarity(a, b, dim=-1).sum())

    def result(self) -> Drift:
        return Drift(self.rows, self.largest, cosine=self.cosine / self.rows)
