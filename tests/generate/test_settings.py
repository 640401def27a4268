"""Search settings as data."""

from __future__ import annotations

import pytest

from polyformer.errors import SpecError
from polyformer.generate import Diverse, Gnmt, Hopeful, LengthPenalty, Limit, Power, Safe, Search


def test_gnmt_penalty_is_the_papers() -> None:
    assert Gnmt(0.2).divisor(13) == pytest.approx((5 + 13) ** 0.2 / (5 + 1) ** 0.2)
    assert Gnmt(0.0).divisor(40) == 1


def test_power_penalty_gives_the_mean() -> None:
    assert Power(1.0).divisor(7) == 7


@pytest.mark.parametrize(
    ("limit", "source", "expected"),
    [
        (Limit(20), 100, 20),
        (Limit(20, 1.5, 3), 4, 9),
        (Limit(20, 1.5, 3), 40, 20),
        (Limit(20, 0.0, 0), 40, 1),
    ],
)
def test_the_limit_is_the_lower_one(limit: Limit, source: int, expected: int) -> None:
    assert limit.of(source) == expected


@pytest.mark.parametrize("penalty", [Gnmt(0.6), Power(1.0), Power(-1.0)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 19, 20])
def test_the_safe_bound_covers_every_length_to_come(penalty: LengthPenalty, length: int) -> None:
    reachable = [penalty.divisor(n) for n in range(min(length + 1, 20), 21)]
    assert Safe().divisor(penalty, length, 20) == max(reachable)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Search(beams=0), "beams must be between 1 and 1024, not 0"),
        (lambda: Search(beams=10**9, nbest=10**9), "beams must be between 1 and 1024"),
        (lambda: Search(beams=4, diverse=Diverse(3)), "4 beams can't be shared by 3 groups evenly"),
        (lambda: Diverse(1), "groups must be at least 2"),
        (lambda: Diverse(2, -1.0), "strength must be 0 or more"),
        (lambda: Search(beams=2, nbest=3), "nbest must be between 1 and the 2 beams"),
        (lambda: Limit(0), "tokens must be at least 1"),
        (lambda: Limit(5, -1.0), "per_source"),
        (lambda: Limit(5, extra=-1), "extra"),
    ],
)
def test_settings_that_can_not_be_are_refused(wrong: object, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        wrong()  # type: ignore[operator]


def test_settings_are_written_and_read() -> None:
    settings = Search(beams=6, penalty=Power(0.5), limit=Limit(99, unfinished="end"), stop=Hopeful(), forbidden=(3,))
    assert Search.from_toml(settings.to_toml()) == settings
    assert Search.from_json(Search().to_json()) == Search()
    with pytest.raises(SpecError, match="did you mean 'Gnmt'"):
        Search.from_data({"penalty": {"type": "Gntm"}})
