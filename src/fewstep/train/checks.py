"""Settings of a run, checked when they are made: what is wrong with a value, and what could stand there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from typing import Any

from fewstep.errors import InputError, quoted


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `low` to `high`; `above` and `below` leave the ends out, `whole` all but integers.

    Infinity is in it only where `endless`. `usual` is a value to take instead of one that is not in it.
    """

    low: float = -inf
    high: float = inf
    above: bool = False
    below: bool = False
    whole: bool = False
    endless: bool = False
    usual: float | None = None

    def __contains__(self, value: object) -> bool:
        number: Any = value
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        if abs(number) == inf:
            return self.endless and number == self.high
        ends = (self.above and number == self.low) or (self.below and number == self.high)
        return bool(self.low <= number <= self.high) and not ends  # NaN is nowhere

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number" if self.endless else "a finite number"
        low, high = (_shown(int(end) if self.whole and abs(end) < inf else end) for end in (self.low, self.high))
        if self.low == -inf:
            return kind if self.high == inf else f"{kind} of at most {high}"
        if self.high < inf and not self.above and not self.below:
            return f"{kind} from {low} to {high}"
        ends = f"{kind} {'above' if self.above else 'of at least'} {low}"
        return ends if self.high == inf else f"{ends} and {'below' if self.below else 'at most'} {high}"

    def nearest(self, value: object) -> float | None:
        """The value of the range that is nearest to `value`, or the usual one where none is."""
        number: Any = value
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(number) < inf:
            return self.usual
        near = min(max(number, self.low), self.high)
        near = round(near) if self.whole else near
        return near if near in self else self.usual


MOST = 10**9
AT_LEAST_1 = Range(low=1, high=MOST, whole=True, usual=1)
COUNT = Range(low=0, high=MOST, whole=True, usual=0)
SHARE = Range(low=0, high=1)
POSITIVE = Range(low=0, above=True, usual=1)
WEIGHT = Range(low=0)


def check_ranges(config: object, ranges: Mapping[str, Range], *, path: str = "") -> None:
    """Raise `InputError` for the first setting of `config` outside its range; None passes. `path` stands before it."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is not None:
            check_number(f"{path}{name}", value, allowed)


def check_number(name: str, value: object, allowed: Range) -> None:
    """Raise `InputError` where `value` is not in the range, with the nearest one that is."""
    if value not in allowed:
        near = allowed.nearest(value)
        instead = "" if near is None else f"; {_shown(near)} would do"
        raise InputError(f"{name} is {_shown(value)}; it must be {allowed}{instead}")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return quoted(value)
