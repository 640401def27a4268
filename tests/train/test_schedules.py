"""Budgets and learning rates by hand."""

from __future__ import annotations

import math

import pytest

from polyformer.errors import SpecError
from polyformer.train.schedules import Constant, Cosine, Decay, Epochs, Minutes, Noam, Schedule, Spent, Steps


def test_noam_is_the_papers_formula() -> None:
    width, warmup = 512, 4000
    schedule = Noam(peak=(width * warmup) ** -0.5, warmup=warmup)
    for step in (1, 10, 3999, 4000, 4001, 100_000):
        wanted = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert schedule.rate(step, 0.0) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("schedule", [Constant(1.0, 10), Cosine(1.0, 10), Decay(1.0, 10), Noam(1.0, 10)])
def test_warm_up_is_linear_and_meets_the_peak(schedule: Schedule) -> None:
    assert [schedule.rate(step, 0.0) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_decays_end_at_their_floor() -> None:
    assert Cosine(2.0, floor=0.1).rate(9, 1.0) == pytest.approx(0.2)
    assert Cosine(2.0).rate(9, 0.5) == pytest.approx(1.0)
    assert Decay(2.0, floor=0.5).rate(9, 1.0) == pytest.approx(1.0)
    assert Decay(2.0).rate(9, 0.25) == pytest.approx(1.5)
    assert Decay(2.0).rate(9, 1.5) == 0.0
    assert Constant(2.0).rate(10**9, 1.0) == 2.0


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert Noam(3.0).rate(1, 0.0) == 3.0
    assert math.isclose(Noam(3.0).rate(4, 0.0), 1.5)


def test_budgets_count_what_they_say() -> None:
    spent = Spent(steps=30, epochs=1.5, seconds=90.0)
    assert Steps(60).share(spent) == 0.5
    assert Epochs(3.0).share(spent) == 0.5
    assert Minutes(3.0).share(spent) == 0.5


@pytest.mark.parametrize("make", [lambda: Steps(0), lambda: Minutes(-1), lambda: Epochs(0), lambda: Cosine(peak=0)])
def test_impossible_values_are_refused(make: object) -> None:
    with pytest.raises(SpecError):
        make()  # type: ignore[operator]
