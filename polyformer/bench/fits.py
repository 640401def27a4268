"""Power laws through measured points: how fast a cost grows, and where two curves meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Power:
    """cost = factor · n^exponent.

    Attributes:
        points: how many measured ones it was fitted to.
        r2: the share of the logarithms' variance that it explains; 1 where they don't vary.
    """

    exponent: float
    factor: float
    points: int
    r2: float

    def at(self, n: float) -> float:
        """Return the cost at a length."""
        return self.factor * math.pow(n, self.exponent)


def fit_power(points: Points, start: int = 0) -> Power | None:
    """Fit a power law by least squares of log cost on log n.

    Args:
        points: (n, cost); those without cost are left out.
        start: the least n that counts: short texts show what doesn't grow.
    Returns:
        None for fewer than two lengths.
    """
    logs = [(math.log(n), math.log(cost)) for n, cost in points if n >= start and cost > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    unexplained = sum((y - mean_y - exponent * (x - mean_x)) ** 2 for x, y in logs)
    spread = sum((y - mean_y) ** 2 for _, y in logs)
    r2 = 1.0 if spread < 1e-18 else 1 - unexplained / spread
    return Power(exponent, math.exp(mean_y - exponent * mean_x), len(logs), r2)


def crossing(own: Power | None, other: Power | None) -> float | None:
    """Return the n from which on `own` costs less than `other`, by their fits; None where it never will."""
    if own is None or other is None or own.exponent >= other.exponent:
        return None
    logarithm = math.log(own.factor / other.factor) / (other.exponent - own.exponent)
    return math.exp(min(max(logarithm, 0.0), 100.0))


def less_from(own: Mapping[int, float], other: Mapping[int, float]) -> int | None:
    """Return the first measured n from which on `own` costs less than `other` wherever both were measured."""
    found = None
    for n in sorted(own.keys() & other.keys()):
        found = (n if found is None else found) if own[n] < other[n] else None
    return found


def expected(points: Points, n: int, least: float, most: float = 2.3) -> float:
    """Return a guess of the cost at a greater n, by the growth between the last two points.

    Args:
        points: in order of n, at least one.
        least, most: bounds of the exponent; with one point it is `least`.
    """
    length, cost = points[-1]
    exponent = least
    if len(points) > 1 and min(cost, points[-2][1]) > 0 and points[-2][0] < length:
        exponent = math.log(cost / points[-2][1]) / math.log(length / points[-2][0])
    return float(cost * (n / length) ** min(max(exponent, least), most))
