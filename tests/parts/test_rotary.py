"""Rotary positions by the paper's equation, and each of their scalings against the reference library."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Dynamic, Interpolated, Llama3, Rotary, Scaling, Yarn
from polyformer.parts.flow import Flow, start_flow


def flow_of(length: int, mask: Tensor | None = None, start: int = 0) -> Flow:
    """A flow of rows whose places begin at `start`."""
    flow = start_flow(torch.zeros(1 if mask is None else len(mask), length), mask)
    flow.positions = flow.positions + start
    return flow


def turned(spec: Rotary, x: Tensor, flow: Flow) -> Tensor:
    return cast(Any, spec.build()).turn(x, flow)


def turned_by_equation(spec: Rotary, x: Tensor, places: Tensor) -> Tensor:
    """Equation 15: pairs are complex numbers, multiplied by exp(i m θ)."""
    half = spec.width // 2
    rates = spec.base ** (-torch.arange(half, dtype=torch.float64) * 2 / spec.width)
    wave = torch.polar(torch.ones(1, dtype=torch.float64), places[:, None].double() * rates)
    x = x.double()
    if spec.layout == "halves":
        first, second = x[..., :half], x[..., half : spec.width]
    else:
        first, second = x[..., 0 : spec.width : 2], x[..., 1 : spec.width : 2]
    made = torch.complex(first, second) * wave
    pairs = (made.real, made.imag)
    joined = torch.cat(pairs, -1) if spec.layout == "halves" else torch.stack(pairs, -1).flatten(-2)
    return torch.cat((joined, x[..., spec.width :]), -1)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("width", [2, 6, 8])
def test_the_papers_equation(width: int, layout: Any) -> None:
    spec, x = Rotary(width, 500.0, layout), torch.randn(2, 3, 9, 8)
    found = turned(spec, x, flow_of(9))
    torch.testing.assert_close(found.double(), turned_by_equation(spec, x, torch.arange(9)), atol=1e-6, rtol=1e-5)
    assert found[..., width:].equal(x[..., width:])
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("scaling", [None, Interpolated(4), Llama3(4, trained=16), Yarn(4, 16), Dynamic(2, 64)])
@given(first=st.integers(0, 40), apart=st.integers(0, 10), moved=st.integers(0, 10))
def test_scores_depend_on_distances_only(scaling: Scaling | None, first: int, apart: int, moved: int) -> None:
    spec = Rotary(8, 100.0, scaling=scaling)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query: int, key: int) -> float:
        return float((turned(spec, q, flow_of(1, start=query)) * turned(spec, k, flow_of(1, start=key))).sum())

    assert score(first + apart, first) == pytest.approx(score(first + apart + moved, first + moved), abs=1e-4)


def test_padding_has_no_place() -> None:
    x, spec = torch.randn(1, 2, 4, 8), Rotary(8)
    padded = torch.cat((torch.randn(1, 2, 3, 8), x), 2)
    flow = flow_of(7, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(turned(spec, padded, flow)[:, :, 3:], turned(spec, x, flow_of(4)))


def test_layers_share_the_waves() -> None:
    part, other, flow = Rotary(8).build(), Rotary(8).build(), flow_of(5)
    x = torch.randn(1, 1, 5, 8)
    made = cast(Any, part).turn(x, flow)
    shared = len(flow._made)
    assert cast(Any, other).turn(x, flow).equal(made)
    assert len(flow._made) == shared


def test_half_precision_turns_by_the_same_angles() -> None:
    """Angles are worked out in float32: at place 1000, bfloat16 would not know one place from the next."""
    spec, x = Rotary(8, 100.0), torch.randn(1, 1, 1, 8)
    exact = turned(spec, x.double(), flow_of(1, start=1001))
    assert float((turned(spec, x.bfloat16(), flow_of(1, start=1001)) - exact).abs().max()) < 0.05


SCALINGS: dict[str, tuple[Scaling | None, dict[str, Any]]] = {
    "default": (None, {}),
    "linear": (Interpolated(3), {"factor": 3.0}),
    "dynamic": (Dynamic(3, 64), {"factor": 3.0}),
    "llama3": (
        Llama3(8, 1, 4, 32),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "yarn": (Yarn(4, 64), {"factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn by halves": (
        Yarn(4, 64, 16, 2, 0.9, whole=False),
        {
            **{"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
            **{"attention_factor": 0.9, "truncate": False},
        },
    ),
    "yarn of a short text": (Yarn(4, 4, whole=False), {"factor": 4.0, "original_max_position_embeddings": 4}),
}


@pytest.mark.parametrize("length", [10, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_frequencies_of_the_reference(name: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    scaling, keys = SCALINGS[name]
    kind = name.split()[0]
    said = {"rope_type": kind, "rope_theta": 1000.0, **keys}
    said |= {"truncate": False} if name == "yarn of a short text" else {}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=64, rope_parameters=said
    )
    if kind == "default":
        expected, strength = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, strength = rope.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    spec = Rotary(32, 1000.0, scaling=scaling)
    found = spec.plain() if scaling is None else scaling.frequencies(spec, length)
    torch.testing.assert_close(found, expected)
    assert (1.0 if scaling is None else scaling.strength()) == pytest.approx(strength)


def test_what_scalings_leave_alone() -> None:
    spec = Rotary(32, 1000.0)
    plain = spec.plain()
    assert Dynamic(4, 64).frequencies(spec, 64).equal(plain)
    assert (Dynamic(4, 64).frequencies(spec, 65)[1:] < plain[1:]).all()
    torch.testing.assert_close(Interpolated(1).frequencies(spec, 9), plain)
    for scaling in (Llama3(8, 1, 4, 64), Yarn(8, 64)):
        found = scaling.frequencies(spec, 9)
        assert found[0] == plain[0]
        torch.testing.assert_close(found[-1], plain[-1] / 8)
        assert ((found >= plain / 8 * 0.999) & (found <= plain)).all()
    assert Yarn(8, 64).strength() == pytest.approx(0.1 * math.log(8) + 1)


def test_strength_is_on_queries_and_keys() -> None:
    x = torch.randn(1, 1, 4, 8)
    spec = Rotary(8, scaling=Yarn(4, 64, attention=1.5))
    torch.testing.assert_close(turned(spec, x, flow_of(4)).norm(dim=-1), 1.5 * x.norm(dim=-1))


def test_refused() -> None:
    with pytest.raises(SpecError, match="width must be even, not 7"):
        Rotary(7)
    with pytest.raises(SpecError, match="high must be greater than low"):
        Llama3(8, 4, 4)
