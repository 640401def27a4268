"""Power laws are found in points that follow them, and so is where two of them meet."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyformer.bench.fits import Power, crossing, expected, fit_power, less_from

LENGTHS = (512, 1024, 2048, 4096, 8192)


def law(factor: float, exponent: float, lengths: tuple[int, ...] = LENGTHS) -> list[tuple[int, float]]:
    return [(n, factor * n**exponent) for n in lengths]


@given(st.floats(1e-9, 1e3), st.floats(-1.0, 3.0))
def test_a_law_is_found(factor: float, exponent: float) -> None:
    found = fit_power(law(factor, exponent))
    assert found is not None
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.at(3000) == pytest.approx(factor * 3000**exponent, rel=1e-6)
    assert found.points == 5
    assert found.r2 == pytest.approx(1, abs=1e-3)


def test_what_is_short_does_not_count() -> None:
    points = [(n, 1.0) for n in (64, 128)] + law(1e-6, 2.0)
    found = fit_power(points, 512)
    assert found is not None
    assert found.exponent == pytest.approx(2)
    assert found.points == 5
    mixed = fit_power(points)
    assert mixed is not None
    assert mixed.r2 < 0.99


def test_noise_lowers_r2_only() -> None:
    noisy = [(n, cost * (1.3 if i % 2 else 1 / 1.3)) for i, (n, cost) in enumerate(law(1e-6, 1.0))]
    found = fit_power(noisy)
    assert found is not None
    assert abs(found.exponent - 1) < 0.1
    assert 0.8 < found.r2 < 1


@pytest.mark.parametrize("points", [[], [(512, 1.0)], [(512, 1.0), (512, 1.1)], [(512, 0.0), (1024, 1.0)]])
def test_one_length_is_no_law(points: list[tuple[int, float]]) -> None:
    assert fit_power(points) is None


def test_nothing_that_varies_is_explained() -> None:
    found = fit_power([(512, 3.0), (1024, 3.0)])
    assert found == Power(0.0, pytest.approx(3.0), 2, 1.0)


@given(st.floats(100, 1e6), st.floats(0.5, 1.4), st.floats(1.6, 2.5))
def test_laws_meet_where_they_are_equal(place: float, slow: float, fast: float) -> None:
    own, other = Power(slow, place**-slow, 5, 1.0), Power(fast, place**-fast, 5, 1.0)
    found = crossing(own, other)
    assert found == pytest.approx(place, rel=1e-6)
    assert crossing(other, own) is None


def test_some_never_meet() -> None:
    one = Power(1.0, 1.0, 5, 1.0)
    assert crossing(one, one) is None
    assert crossing(None, one) is None
    assert crossing(one, None) is None
    assert crossing(Power(1.0, 1e-9, 5, 1.0), Power(2.0, 1.0, 5, 1.0)) == 1.0
    assert crossing(Power(1.0, 1e300, 5, 1.0), Power(1.0 + 1e-9, 1.0, 5, 1.0)) == math.exp(100)


@pytest.mark.parametrize(
    ("own", "other", "found"),
    [
        ({512: 3.0, 1024: 1.0, 2048: 1.0}, {512: 2.0, 1024: 2.0, 2048: 2.0}, 1024),
        ({512: 1.0, 1024: 3.0, 2048: 1.0}, {512: 2.0, 1024: 2.0, 2048: 2.0}, 2048),
        ({512: 1.0, 1024: 3.0}, {512: 2.0, 1024: 2.0}, None),
        ({512: 1.0, 4096: 1.0}, {512: 2.0, 1024: 2.0}, 512),
        ({4096: 1.0}, {512: 2.0}, None),
        ({512: 2.0}, {512: 2.0}, None),
    ],
)
def test_faster_from_on(own: dict[int, float], other: dict[int, float], found: int | None) -> None:
    assert less_from(own, other) == found


def test_what_is_to_come_is_foretold() -> None:
    assert expected(law(1.0, 2.0, (256, 512)), 1024, 1.0) == pytest.approx(1024.0**2)
    assert expected([(256, 1.0)], 1024, 2.0) == pytest.approx(16)
    assert expected([(256, 1.0), (512, 1.0)], 1024, 2.0) == pytest.approx(4), "growth is at least what is told"
    assert expected(law(1.0, 5.0, (256, 512)), 1024, 1.0) <= 512.0**5 * 2**2.3
    assert expected([(256, 0.0), (512, 3.0)], 1024, 1.0) == pytest.approx(6)
