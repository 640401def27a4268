"""What encoders are tuned for: labels of whole items, and texts that belong together near each other.

Shape letters: B items of a batch, D width, E width of a text's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.data.labelled import ItemBatch, RelatedBatch
from polyformer.errors import DataError, SpecError
from polyformer.generate.search import evaluating
from polyformer.judge import HeldOut
from polyformer.parts.flow import start_flow
from polyformer.parts.model import TransformerPart
from polyformer.parts.part import Part
from polyformer.train.objectives import Aim, Loss


def label_loss(model: TransformerPart, batch: ItemBatch, smoothing: float) -> Loss:
    """The cross-entropy of items' labels, summed; with label smoothing as `sequence_loss` has it."""
    logits = label_scores(model, batch)
    labels = batch.labels.to(logits.device)
    objective = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return Loss(objective, F.cross_entropy(logits.detach(), labels, reduction="sum"), batch.target_tokens)


def label_scores(model: TransformerPart, batch: ItemBatch) -> Tensor:
    """Return the scores of labels [B, labels], in single precision; raises `SpecError` for a model that has none."""
    logits = model(**batch.on(model)).logits
    if logits is None or logits.ndim != 2:
        raise SpecError("this model does not give one score to a label of the whole input")
    return logits.float()


def contrastive(pooling: Part, temperature: float) -> Aim:
    """Return the loss by which an anchor's own text is to be told from all others of the batch.

    It is the cross-entropy of the anchor's own text among the positives and negatives of the batch, by cosines divided
    by the temperature (Henderson et al. 2017, section 4.4; van den Oord et al. 2018). A text that is the same as the
    anchor's own is no wrong answer, and is left out.
    """

    def loss(model: TransformerPart, batch: RelatedBatch, smoothing: float) -> Loss:
        anchors, others = (vectors(model, pooling, *one) for one in (batch.anchors, batch.others))
        scores = anchors @ others.T / temperature
        own = torch.arange(len(anchors), device=scores.device)
        same = batch.same.to(scores.device)
        twin = same[None] == same[: len(own), None]
        twin[own, own] = False
        scores = scores.masked_fill(twin, float("-inf"))
        likelihood = F.cross_entropy(scores, own, reduction="sum")
        objective = likelihood
        if smoothing:
            spread = -scores.log_softmax(-1).masked_fill(twin, 0.0).sum(-1) / (~twin).sum(-1)
            objective = (1 - smoothing) * likelihood + smoothing * spread.sum()
        return Loss(objective, likelihood.detach(), batch.target_tokens)

    return Aim(loss, summed(loss))


def vectors(model: TransformerPart, pooling: Part, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the vector of each text, of length 1: [B, E]."""
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    rows = model.decode(ids, mask) if model.encoder is None else model.encode(ids, mask).hidden
    found: Tensor = pooling(rows, start_flow(rows, mask))
    return F.normalize(found.float(), dim=-1)


def summed(loss: Callable[[TransformerPart, Any, float], Loss]) -> Callable[[TransformerPart, Iterable[Any]], HeldOut]:
    """Return what measures a loss on held-out batches: its sum, without dropout and smoothing."""

    def held_out(model: TransformerPart, batches: Iterable[Any]) -> HeldOut:
        nats, items = 0.0, 0
        with evaluating(model):
            for batch in batches:
                found = loss(model, batch, 0.0)
                nats += float(found.likelihood)
                items += found.tokens
        if not items:
            raise DataError("there are no held-out examples to measure a loss on")
        return HeldOut(nats, items)

    return held_out


LABELS = Aim(label_loss, summed(label_loss))
"""Of whole items."""
