"""What is minimised, and how the same is measured on held-out batches.

Cross-entropy with label smoothing never holds the logits of a whole batch.

Shape letters: N target tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from polyformer.data.reader import TrainingBatch
from polyformer.errors import RunError
from polyformer.judge.held_out import HeldOut, held_out_loss
from polyformer.parts.experts import routing_loss, routing_trace
from polyformer.parts.heads import LMHeadPart
from polyformer.parts.linear import LinearPart
from polyformer.parts.model import TransformerPart

if TYPE_CHECKING:
    from polyformer.parts.part import Part

IGNORED = -100
CHUNK_BYTES = 8 * 2**20
CHUNK_ROWS, MOST_BYTES = 128, 32 * 2**20
"""Rows that a chunk should have: the matrix is read once for each. But their logits may not take more than this."""


@dataclass
class Loss:
    """Sums over the real target tokens of a batch.

    Attributes:
        objective: what is minimised, label smoothing included; differentiable.
        likelihood: negative log-likelihood in nats, without smoothing; for reports.
        tokens: how many there are.
    """

    objective: Tensor
    likelihood: Tensor
    tokens: int

    def beside(self, mean: Tensor) -> Loss:
        """Return this loss with a mean, such as the routers' loss, beside it in the objective: each token adds it."""
        return Loss(self.objective + self.tokens * mean, self.likelihood, self.tokens)


def batch_loss(model: TransformerPart, batch: TrainingBatch, smoothing: float) -> Loss:
    """The loss of a batch, summed over its target tokens, and that of its routers."""
    if model.head is None:
        raise RunError("a model without a language-modelling head can't be trained on texts")
    trace = routing_trace(model)
    hidden = batch.hidden(model, trace)
    loss = sequence_loss(model.head, hidden, batch.labels.to(hidden.device), smoothing)
    return loss if trace is None else loss.beside(routing_loss(trace))


@dataclass(frozen=True)
class Aim:
    """What a run minimises.

    Attributes:
        loss: of a model, a batch and the label smoothing.
        held_out: the same of held-out batches, without dropout and smoothing.
    """

    loss: Callable[[TransformerPart, Any, float], Loss]
    held_out: Callable[[TransformerPart, Iterable[Any]], HeldOut]


LIKELIHOOD = Aim(batch_loss, held_out_loss)
"""Of tokens, each from a row of the model."""


def sequence_loss(head: Part, hidden: Tensor, labels: Tensor, smoothing: float = 0.0) -> Loss:
    """Sum the cross-entropy of `head(hidden)` against `labels`.

    With label smoothing ε the target is (1 - ε) on the label and ε/V on every token (Szegedy et al. 2016,
    section 7; Vaswani et al. 2017, section 5.4).

    The logits [N, V] of a batch are the largest tensor of a small model's training by far. Here they are made for
    a few rows at a time, turned into their own gradient in place, multiplied into the gradients of the rows and
    of the head's matrix, and forgotten: memory for one chunk instead of a batch, and fewer passes over it. For a head
    that is not trained, no gradient is made.

    Args:
        head: an `LMHead`; one with a plain `Linear` takes the fast path, any other is recomputed in backward.
        hidden: [..., D].
        labels: integers [...], -100 where there is no token.
        smoothing: ε in [0, 1).
    """
    flat = labels.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    real = flat != IGNORED
    tokens = int(real.sum())
    if tokens < len(flat):
        places = real.nonzero()[:, 0]
        rows, flat = rows.index_select(0, places), flat.index_select(0, places)
    if isinstance(head, LMHeadPart) and head.cap is None and type(head.projection) is LinearPart:
        matrix, bias = head.projection.weight, head.projection.bias
        prepared = head.prepare(rows)
        learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (prepared, matrix, bias))
        objective, likelihood = ChunkedCrossEntropy.apply(prepared, matrix, bias, flat, smoothing, learning)  # type: ignore[no-untyped-call]
        return Loss(objective, likelihood, tokens)
    size = max(1, CHUNK_BYTES // (4 * 32768))
    pieces = [
        checkpoint(_plain_loss, head, r, f, smoothing, use_reentrant=False)
        for r, f in zip(torch.split(rows, size), torch.split(flat, size), strict=True)
    ]
    objective = torch.stack([p[0] for p in pieces]).sum()
    return Loss(objective, torch.stack([p[1] for p in pieces]).sum().detach(), tokens)


def _plain_loss(head: Part, rows: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    logits = head(rows, None)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    objective = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return objective, F.cross_entropy(logits.detach(), labels, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """(rows [N, D], weight [V, D], bias [V] or None, labels [N], ε, learning) -> (objective, likelihood), both sums.

    The gradient of the objective with respect to a row's logits is softmax - (1 - ε)·onehot - ε/V. It is known as
    soon as the logits are, so forward computes all gradients and backward only scales them; unless nothing is being
    learned.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, learning: bool
    ) -> tuple[Tensor, Tensor]:
        device = rows.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        with torch.autocast(device, enabled=False):
            inputs, matrix = rows.to(kind), weight.to(kind)
            needs = zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
            gradients = Gradients.like(inputs, *(x if need else None for x, need in needs)) if learning else None
            size = min(len(rows), chunk_rows(len(weight)))
            low = torch.empty(size, len(weight), dtype=kind, device=rows.device)
            room = low.to(torch.promote_types(kind, torch.float32))  # `low` itself where that is wide enough
            objective = room.new_zeros((), dtype=torch.float64)
            likelihood = objective.clone()
            for start in range(0, len(rows), max(size, 1)):
                piece, own = inputs[start : start + size], labels[start : start + size, None]
                scores = torch.mm(piece, matrix.T, out=low[: len(piece)])
                logits = room[: len(piece)].copy_(scores)
                if bias is not None:
                    logits += bias
                at_label = logits.gather(1, own)
                wanted = (
                    (1 - smoothing) * at_label + smoothing * logits.mean(-1, keepdim=True) if smoothing else at_label
                )
                partition, probabilities = _softmax(logits)
                likelihood += (partition - at_label).sum()
                objective += (partition - wanted).sum()
                if gradients is not None:
                    if smoothing:
                        probabilities -= smoothing / len(weight)
                    probabilities.scatter_add_(1, own, probabilities.new_full(own.shape, smoothing - 1))
                    gradients.add(start, piece, matrix, probabilities, scores)
        ctx.gradients = gradients
        ctx.kind = rows.dtype
        ctx.mark_non_differentiable(likelihood)
        return objective.to(room.dtype), likelihood

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Any, ...]:
        found = ctx.gradients
        weight, bias = (None if one is None else one * scale for one in (found.weight, found.bias))
        return found.rows.to(ctx.kind) * scale, weight, bias, None, None, None


def chunk_rows(vocabulary: int) -> int:
    """Return for how many rows the logits are made at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary), min(CHUNK_ROWS, MOST_BYTES // (4 * vocabulary)))


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [N, V] into probabilities in place; return log Σ exp [N, 1] and them."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return top + total.log(), logits.mul_(1 / total)


@dataclass
class Gradients:
    """The gradients of the objective as they grow, chunk by chunk; None of a parameter that is not trained.

    `room` is reused for each chunk's share where that is of another type than the sum.
    """

    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None
    room: Tensor | None = None

    @classmethod
    def like(cls, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """Make zeros for the parameters that are given, and room for the rows [N, D]."""
        made = cls(
            torch.empty_like(inputs), *(None if one is None else torch.zeros_like(one) for one in (weight, bias))
        )
        if weight is not None and weight.dtype != inputs.dtype:
            made.room = torch.empty_like(weight, dtype=inputs.dtype)
        return made

    def add(self, start: int, piece: Tensor, matrix: Tensor, gradient: Tensor, low: Tensor) -> None:
        """Add a chunk: its rows [n, D], the matrix [V, D], the gradient of its logits [n, V], and room for that."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        narrow = low.copy_(gradient)
        torch.mm(narrow, matrix, out=self.rows[start : start + len(piece)])
        if self.weight is None:
            return
        if self.room is None:
            self.weight.addmm_(narrow.T, piece)
        else:
            self.weight += torch.mm(narrow.T, piece, out=self.room)
