"""Retention by the paper's equations, in its three forms; and RetNet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.families import RetNet
from polyformer.parts import Causal, Everyone, LayerNorm, Linear, Retention, Window
from polyformer.parts.flow import Flow, GrowingCache, start_flow
from polyformer.parts.model import parameters_of
from tests.parts.linear import forward_and_back, growth
from tests.parts.models import gradients

DECAYS = (0.6, 0.9)
SPEC = Retention.of_width(12, 2, Causal()).replace(decays=DECAYS)


def build(spec: Retention = SPEC) -> Any:
    torch.manual_seed(1)
    return spec.build(dtype=torch.float64)


def flow_of(x: Tensor, cache: GrowingCache | None = None) -> Flow:
    return start_flow(x, cache=cache)


def turned(x: Tensor) -> Tensor:
    """x_n e^{inθ}, where neighbouring elements of x are real and imaginary part (section 2.1): [B, H, S, E]."""
    width = x.shape[-1]
    theta = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angles = (torch.arange(x.shape[2]).float()[:, None] * theta).double()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def projected(part: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = ((x @ one.weight.T).unflatten(-1, (2, -1)).transpose(1, 2) for one in (part.q, part.k, part.v))
    return turned(q), turned(k) / math.sqrt(q.shape[-1]), v


def parallel(part: Any, x: Tensor) -> Tensor:
    """(Q Kᵀ ⊙ D) V (equation 5)."""
    q, k, v = projected(part, x)
    length = x.shape[1]
    d = torch.zeros(2, length, length, dtype=x.dtype)
    for head, decay in enumerate(DECAYS):
        for n in range(length):
            for m in range(n + 1):
                d[head, n, m] = decay ** (n - m)
    return (q @ k.mT * d) @ v


def recurrent(part: Any, x: Tensor) -> Tensor:
    """S_n = γ S_{n-1} + K_nᵀ V_n; the answer is Q_n S_n (equation 6)."""
    q, k, v = projected(part, x)
    state, rows = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=x.dtype), []
    decay = torch.tensor(DECAYS, dtype=x.dtype)[:, None, None]
    for n in range(x.shape[1]):
        state = decay * state + k[:, :, n, :, None] * v[:, :, n, None, :]
        rows.append((q[:, :, n, None] @ state)[:, :, 0])
    return torch.stack(rows, 2)


def finished(part: Any, x: Tensor, retained: Tensor) -> Tensor:
    """(swish(X W_G) ⊙ GroupNorm(heads)) W_O (equation 8)."""
    mean = retained.mean(-1, keepdim=True)
    variance = (retained - mean).square().mean(-1, keepdim=True)
    normed = ((retained - mean) / (variance + 1e-5).sqrt()).transpose(1, 2).flatten(2)
    gate = x @ part.gate.weight.T
    return (gate / (1 + (-gate).exp()) * normed) @ part.o.weight.T


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 11, 64], ids=lambda chunk: f"chunk{chunk}")
@pytest.mark.parametrize("length", [1, 2, 11])
def test_every_form_is_the_papers(chunk: int, length: int) -> None:
    part = build(SPEC.replace(chunk=chunk))
    x = torch.randn(2, length, 12, dtype=torch.float64)
    found = part(x, flow_of(x))
    for form in (parallel, recurrent):
        # sines are those of angles in float32, as in the part
        torch.testing.assert_close(found, finished(part, x, form(part, x)), atol=1e-5, rtol=1e-5)
    own = build(SPEC.replace(chunk=length))(x, flow_of(x))
    torch.testing.assert_close(found, own)


def test_gradients_are_those_of_the_parallel_form() -> None:
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    found = []
    for chunk in (1, 4, 64):
        part = build(SPEC.replace(chunk=chunk))
        found.append(gradients(part, part(x, flow_of(x)).square().sum()))
    part = build()
    by_hand = gradients(part, finished(part, x, parallel(part, x)).square().sum())
    for name, wanted in by_hand.items():
        for one in found:
            torch.testing.assert_close(one[name], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[0][name], found[2][name])


def test_token_by_token_is_the_recurrent_form() -> None:
    part, cache = build(), GrowingCache()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    found = []
    for row in x.split(1, 1):
        found.append(part(row, flow_of(row, cache)))
        cache.length += 1
    torch.testing.assert_close(torch.cat(found, 1), finished(part, x, recurrent(part, x)), atol=1e-5, rtol=1e-5)
    width, values, batch, heads, of_float64 = 6, 12, 2, 2, 8
    assert cache.bytes == batch * (heads * width * values + 1) * of_float64


def test_far_places_keep_their_precision() -> None:
    """Decays of differences of places are exact however far along a text is."""
    part = build(SPEC.replace(position=None, chunk=16)).to(torch.float32)
    cache, x = GrowingCache(length=100_000), torch.randn(1, 40, 12)
    far, near = part(x, flow_of(x, cache)), part(x, flow_of(x))
    torch.testing.assert_close(far, near)


def test_cost_is_linear() -> None:
    part = build(SPEC.replace(chunk=16))

    def run(n: int) -> None:
        forward_and_back(lambda x: part(x, flow_of(x)), torch.randn(1, n, 12, dtype=torch.float64))

    largest, all_together = growth(run, 256)
    assert largest <= 2
    assert all_together <= 2.02


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"see": Everyone()}, "Retention: can't honour the rule Everyone; it knows Causal, SameDocument"),
        ({"see": Causal() & Window(4)}, "Retention: can't honour the rule Window"),
        ({"decays": ()}, "needs a decay for each"),
        ({"decays": (0.5, 1.0)}, "decays must be between 0 and 1"),
        ({"decays": (0.5,) * 5}, "5 heads must be able to share as many values of q, k evenly"),
        ({"k": Linear(12, 10)}, r"values of q, k evenly, not \[10, 12\]"),
        ({"o": Linear(12, 12)}, "values of v, gate, o evenly"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        SPEC.replace(**changes)


@pytest.mark.parametrize(("width", "heads"), [(12, 0), (12, 5), (6, 2)])
def test_widths_that_heads_can_not_share(width: int, heads: int) -> None:
    with pytest.raises(SpecError, match="can't be cut into"):
        Retention.of_width(width, heads, Causal())


class TestRetNet:
    def test_sizes(self) -> None:
        width, layers, vocabulary = 16, 3, 11
        spec = RetNet(vocabulary, width, layers, 2).spec()
        norms = 2 * width * (2 * layers + 1)
        assert parameters_of(spec.build("meta")) == 12 * width**2 * layers + 2 * vocabulary * width + norms
        assert spec.decoder.blocks[0].steps[0].op.decays == (1 - 2**-5, 1 - 2**-6)
        assert spec.decoder.blocks[0].steps[0].op.norm.norm == LayerNorm(16, gain=False, bias=False)
        tied = RetNet(vocabulary, width, layers, 2, ties="output").spec().build()
        assert tied.head.projection.weight is tied.target.tokens.weight

    def test_the_papers_smallest(self) -> None:
        assert 1.2e9 < parameters_of(RetNet(50257).spec().build("meta")) < 1.45e9

    def test_it_is_data(self) -> None:
        config = RetNet(11, 16, 2, 2, hidden=20, dropout=0.1)
        assert RetNet.from_toml(config.to_toml()) == config
        spec = config.spec()
        assert type(spec).from_json(spec.to_json()) == spec
        with pytest.raises(SpecError, match="layers must be at least 1"):
            RetNet(11, layers=0)

    def test_it_learns(self) -> None:
        model = RetNet(11, 16, 2, 2).spec().build()
        ids = torch.arange(40)[None] % 7
        optimiser, losses = torch.optim.Adam(model.parameters(), 1e-2), []
        for _ in range(20):
            logits = model(ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < losses[0] / 4
