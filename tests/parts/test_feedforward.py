"""The feed-forward network and its gated forms, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from polyformer.parts import Dropout, FeedForward
from polyformer.parts.flow import start_flow

BY_HAND: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}
activations = pytest.mark.parametrize("name", BY_HAND)


def curve(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([BY_HAND[name](float(value)) for value in x.detach()], dtype=x.dtype)


@activations
@pytest.mark.parametrize("bias", [True, False])
def test_plain(name: str, bias: bool) -> None:
    part = FeedForward.of_widths(5, 9, name, bias).build(dtype=torch.float64)
    if bias:
        torch.nn.init.normal_(part.up.bias)
        torch.nn.init.normal_(part.down.bias)
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    for row, out in zip(x[0], part(x, start_flow(x))[0], strict=True):
        hidden = curve(name, part.up.weight @ row + (part.up.bias if bias else 0))
        torch.testing.assert_close(out, part.down.weight @ hidden + (part.down.bias if bias else 0))


@activations
def test_gated(name: str) -> None:
    part = FeedForward.gated(5, 9, name).build(dtype=torch.float64)
    assert sum(p.numel() for p in part.parameters()) == 3 * 5 * 9
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    for row, out in zip(x[0], part(x, start_flow(x))[0], strict=True):
        hidden = curve(name, part.gate.weight @ row) * (part.up.weight @ row)
        torch.testing.assert_close(out, part.down.weight @ hidden)


def test_swiglu_is_the_default_gate() -> None:
    assert FeedForward.gated(5, 9) == FeedForward.gated(5, 9, "silu", bias=False)


def test_dropout_stands_before_the_second_matrix() -> None:
    part = FeedForward.of_widths(4, 5000).replace(dropout=Dropout(0.5)).build(dtype=torch.float64)
    with torch.no_grad():
        part.up.weight.fill_(0)
        part.up.bias.fill_(1)
        part.down.weight.fill_(1 / 5000)
    x = torch.zeros(1, 1, 4, dtype=torch.float64)
    assert torch.allclose(part.eval()(x, start_flow(x)), torch.ones_like(x))
    trained = part.train()(x, start_flow(x))
    assert 0.9 < float(trained[0, 0, 0].detach()) < 1.1
    assert not torch.allclose(trained, torch.ones_like(x), atol=1e-6)
