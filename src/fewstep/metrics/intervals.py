"""95 % confidence intervals of measured values and of shares."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from fewstep.errors import InputError
from fewstep.tables import format_number

NORMAL_95 = 1.96
"""Standard errors to either side that hold 95 % of a normal distribution."""


class Interval(NamedTuple):
    """A measured value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Estimate(NamedTuple):
    """A measured value with its standard error."""

    value: float
    standard_error: float

    @property
    def interval(self) -> Interval:
        """The 95 % interval of an estimate that scatters normally."""
        half = NORMAL_95 * self.standard_error
        return Interval(self.value, self.value - half, self.value + half)


def share_interval(share: float, count: int) -> Interval:
    """A share, in [0, 1], of `count` images or votes with Wilson's interval, which stays within [0, 1].

    Unlike the normal interval it has a width at 0 and at 1. Raises InputError for a count of nothing, which
    leaves any share possible, or a share outside [0, 1].
    """
    if count < 1:
        raise InputError(f"a share of {count} is anything from 0 to 1; count at least one")
    if not 0 <= share <= 1:
        raise InputError(f"share {share} is not in [0, 1]; give hits / count")
    weight = NORMAL_95**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def format_interval(interval: Interval) -> str:
    """`0.930 (0.886 to 0.958)`."""
    return f"{format_number(interval.value)} ({format_number(interval.low)} to {format_number(interval.high)})"
