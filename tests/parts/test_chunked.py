"""A part walked over a few rows at a time: the same answer, and less held at once."""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import (
    Attention,
    BatchNorm,
    Causal,
    Chunked,
    Convolution,
    Dropout,
    Experts,
    FeedForward,
    Linear,
)
from polyformer.parts.flow import start_flow
from polyformer.spec import Spec
from tests.parts.kept import kept_by_autograd
from tests.spec.trees import WIDTH

FEEDING = FeedForward.of_widths(WIDTH, 64)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_it_is_the_op(rows: int) -> None:
    part, x = Chunked(FEEDING, rows).build(dtype=torch.float64), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    x.requires_grad_()
    out, whole = part(x, start_flow(x)), part.op(x, start_flow(x))
    torch.testing.assert_close(out, whole)
    wanted = torch.autograd.grad(whole.square().sum(), [x, *part.parameters()])
    for found, other in zip(torch.autograd.grad(out.square().sum(), [x, *part.parameters()]), wanted, strict=True):
        torch.testing.assert_close(found, other)


def test_less_is_held_at_once() -> None:
    peaks = []
    for spec in (FEEDING, Chunked(FEEDING, 4)):
        part, x = spec.build(), torch.randn(2, 64, WIDTH, requires_grad=True)
        with kept_by_autograd(part) as kept:
            part(x, start_flow(x)).sum().backward()
        peaks.append(kept.peak)
    assert peaks[1] < peaks[0] / 4


def test_dropout_drops_the_same_again() -> None:
    part, x = Chunked(Dropout(0.5), 2).build().train(), torch.ones(2, 7, WIDTH, requires_grad=True)
    out = part(x, start_flow(x))
    assert 0 < (out == 0).sum() < out.numel()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Convolution(WIDTH, WIDTH, 3, padding=1), "Convolution can't be walked piece by piece"),
        (BatchNorm(WIDTH), "BatchNorm can't be walked piece by piece"),
        (Attention.of_width(WIDTH, 2, Causal()), "in Attention, rows meet"),
        (Experts.of(FEEDING, WIDTH, 3, 2), "in Experts, rows meet or are written down by slot"),
        (Linear(WIDTH, WIDTH), "rows must be at least 1"),
    ],
)
def test_what_can_not_be(op: Spec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Chunked(op, 0 if isinstance(op, Linear) else 2).build()
