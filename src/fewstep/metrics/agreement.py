"""Agreement of raters beyond chance: Cohen's and Fleiss' kappa."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain

Ratings = Mapping[str, Mapping[str, Hashable]]
"""By rater, then by what was rated: the category that was chosen."""


def kappa(ratings: Ratings) -> float | None:
    """Cohen's kappa of two raters, Fleiss' of more: 1 for full agreement, 0 for that of chance, in [-1, 1].

    What fewer than two have rated does not count. None where kappa is not defined: nothing was rated twice, or all
    chose one category throughout.
    """
    raters = list(ratings.values())
    rated = sorted(set(chain.from_iterable(raters)))
    if len(raters) == 2:
        shared = [thing for thing in rated if all(thing in choices for choices in raters)]
        return cohen_kappa([raters[0][thing] for thing in shared], [raters[1][thing] for thing in shared])
    return fleiss_kappa([[choices[thing] for choices in raters if thing in choices] for thing in rated])


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same things, in order, who may favour different categories.

    doi:10.1177/001316446002000104. None where it is not defined.
    """
    count = len(first)
    if not count:
        return None
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    mine, theirs = Counter(first), Counter(second)
    return _beyond(agreed, sum(mine[name] * theirs[name] for name in mine) / count**2)


def fleiss_kappa(chosen: Sequence[Sequence[Hashable]]) -> float | None:
    """Agreement of several raters: `chosen` holds, for each thing, the categories that its raters chose.

    doi:10.1037/h0031619. The number of raters may differ between things; those of fewer than two are left out. None
    where it is not defined.
    """
    counts = [Counter(categories) for categories in chosen if len(categories) > 1]
    if not counts:
        return None
    agreed = [sum(n * (n - 1) for n in c.values()) / (c.total() * (c.total() - 1)) for c in counts]
    pooled = sum(counts, Counter[Hashable]())
    return _beyond(sum(agreed) / len(agreed), sum((n / pooled.total()) ** 2 for n in pooled.values()))


def _beyond(agreed: float, by_chance: float) -> float | None:
    return None if by_chance > 1 - 1e-12 else (agreed - by_chance) / (1 - by_chance)
