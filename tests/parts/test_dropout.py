"""Dropout: its rate, its scale, its gradient, and that PyTorch's seed governs it."""

from __future__ import annotations

import copy

import pytest
import torch

from polyformer.parts import Dropout
from polyformer.parts.dropout import keep_mask

RATES = [0.1, 0.3, 0.5, 0.9]


@pytest.mark.parametrize("rate", RATES)
class TestMask:
    def test_rate_scale_and_mean(self, rate: float) -> None:
        mask = keep_mask(torch.zeros(1000, 1000), rate)
        zeros = float((mask == 0).double().mean())
        spread = (rate * (1 - rate) / 1e6) ** 0.5
        assert abs(zeros - rate) < 5 * spread + 1 / 65536
        scale = mask.unique()
        assert len(scale) == 2
        assert float(scale[1]) == pytest.approx(1 / (1 - rate), rel=1e-3)
        assert float(mask.double().mean()) == pytest.approx(1, abs=5 * spread / (1 - rate))

    def test_elements_are_independent(self, rate: float) -> None:
        mask = (keep_mask(torch.zeros(1000, 1000), rate) != 0).double() - (1 - rate)
        bound = 5 * rate * (1 - rate) / 1000
        for shift in (1, 2, 3, 4, 8, 1000):
            flat = mask.flatten()
            assert abs(float((flat[shift:] * flat[:-shift]).mean())) < bound

    def test_the_gradient_is_the_mask(self, rate: float) -> None:
        part = Dropout(rate).build()
        x = torch.randn(20, 30, requires_grad=True)
        out = part(x)
        out.sum().backward()
        torch.testing.assert_close(x.grad, out.detach() / x.detach())

    def test_the_seed_decides(self, rate: float) -> None:
        part, x = Dropout(rate).build(), torch.ones(50, 50)
        torch.manual_seed(7)
        first, second = part(x), part(x)
        torch.manual_seed(7)
        assert torch.equal(part(x), first)
        assert torch.equal(part(x), second)
        assert not torch.equal(first, second)
        torch.manual_seed(8)
        assert not torch.equal(part(x), first)

    def test_nothing_in_evaluation(self, rate: float) -> None:
        part, x = Dropout(rate).build().eval(), torch.randn(5, 5)
        state = torch.get_rng_state()
        assert part(x) is x
        assert torch.equal(torch.get_rng_state(), state)


def test_the_generators_state_can_be_put_back() -> None:
    part, x = Dropout(0.5).build(), torch.ones(40, 40)
    state = torch.get_rng_state()
    first = part(x)
    torch.set_rng_state(state)
    assert torch.equal(part(x), first)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (4,), (5,), (2, 0, 3), (3, 5, 7)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    assert Dropout(0.5).build()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    out = Dropout(0.5).build()(torch.ones(100, 100, dtype=dtype))
    assert out.dtype == dtype
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_a_strided_input_keeps_its_elements() -> None:
    x = torch.randn(6, 8).t()
    out = Dropout(0.5).build()(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], 2 * x[kept])


def test_extreme_rates() -> None:
    x = torch.ones(100, 100)
    assert torch.equal(Dropout(0.0).build()(x), x)
    assert torch.isfinite(Dropout(0.9999999).build()(x)).all()
    assert float(Dropout(1e-9).build()(x).mean()) == 1


def test_copies_share_nothing_but_the_seed() -> None:
    part = Dropout(0.5).build()
    other, x = copy.deepcopy(part), torch.ones(30, 30)
    assert not torch.equal(part(x), other(x))
