"""Loss and perplexity on held-out pairs and texts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import DataError, SpecError
from polyformer.generate.search import evaluating
from polyformer.parts.model import TransformerPart
from polyformer.parts.part import Part

if TYPE_CHECKING:
    from polyformer.data.reader import TrainingBatch

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class HeldOut:
    """How well a model predicts target tokens that it has not seen.

    Attributes:
        nats: the sum of negative log-likelihoods.
        tokens: how many target tokens, end tokens included.
    """

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __add__(self, other: HeldOut) -> HeldOut:
        return HeldOut(self.nats + other.nats, self.tokens + other.tokens)

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


def held_out_loss(model: TransformerPart, batches: Iterable[TrainingBatch]) -> HeldOut:
    """Measure the likelihood of what batches ask for, without dropout and without label smoothing.

    Every token counts the same, in whatever batch it stands.

    Raises:
        DataError: no target tokens.
        SpecError: a model without a head.
    """
    if model.head is None:
        raise SpecError("a loss needs a model with a head")
    nats, tokens = 0.0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            hidden, labels = batch.hidden(model), batch.labels.to(device)
            real = labels >= 0
            nats += negative_log_likelihood(model.head, hidden[real], labels[real])
            tokens += batch.target_tokens
    if not tokens:
        raise DataError("there are no held-out target tokens to measure a loss on")
    return HeldOut(nats, tokens)


def negative_log_likelihood(head: Part, hidden: Tensor, labels: Tensor) -> float:
    """Return the sum over rows, in nats; logits are made for a few rows at a time and forgotten.

    Args:
        hidden: [R, D].
        labels: integers [R].
    """
    vocabulary = head(hidden[:0], None).shape[-1]
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part, own in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True):
        total += F.cross_entropy(head(part, None).float(), own, reduction="sum")
    return float(total)
