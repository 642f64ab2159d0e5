"""Shares of images and of votes, the strengths that votes give, and how sure they are."""

from __future__ import annotations

from itertools import combinations
from math import log, sqrt

import pytest
import torch

from fewstep.errors import InputError
from fewstep.metrics.bradley_terry import VoteCounts, preferred, strengths
from fewstep.metrics.intervals import Estimate, share_interval


@pytest.mark.parametrize("count", [1, 10, 200])
@pytest.mark.parametrize("hits", [0.0, 0.3, 1.0])
def test_wilson_s_ends_are_where_the_share_is_1_96_errors_away(hits, count):
    share, low, high = share_interval(hits, count)
    assert (share, 0 <= low <= hits <= high <= 1, low < high) == (hits, True, True)
    for end in (low, high):
        if 1e-12 < end < 1 - 1e-12:
            assert abs(hits - end) == pytest.approx(1.96 * sqrt(end * (1 - end) / count))


def test_wilson_s_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(37, 120).proportion_ci(method="wilson")
    assert share_interval(37 / 120, 120)[1:] == pytest.approx(tuple(theirs), abs=1e-5)


@pytest.mark.parametrize(("share", "count"), [(0.5, 0), (0.5, -1), (-0.1, 9), (1.1, 9), (float("nan"), 9)])
def test_shares_that_cannot_be_are_refused(share, count):
    with pytest.raises(InputError, match="share"):
        share_interval(share, count)


def test_an_estimate_s_interval_is_1_96_errors_wide_to_either_side():
    assert Estimate(2.0, 0.5).interval == pytest.approx((2.0, 1.02, 2.98))


def votes(first: str, second: str, *counts: int) -> VoteCounts:
    return VoteCounts(
        first=first,
        second=second,
        for_first=counts[0],
        for_second=counts[1],
        ties=counts[2] if len(counts) > 2 else 0,
    )


def test_a_tie_is_half_a_vote_for_either():
    assert preferred(votes("a", "b", 50, 30, 20)) == share_interval(0.6, 100)


@pytest.mark.parametrize(("first", "second"), [("a", "a"), ("a", "b")])
def test_votes_that_cannot_be_are_refused(first, second):
    with pytest.raises(InputError, match="compared with itself" if first == second else "negative"):
        votes(first, second, 1, -1 if first != second else 1)
    with pytest.raises(InputError, match="share of 0"):
        preferred(votes("a", "b", 0, 0))


@pytest.mark.parametrize("counts", [(30, 10), (1, 1), (1, 2000), (20, 0, 20)])
def test_two_models_have_their_closed_form(counts):
    found = strengths([votes("a", "b", *counts)])
    ties = counts[2] if len(counts) > 2 else 0
    wins, losses = counts[0] + ties / 2, counts[1] + ties / 2
    assert found["a"].value - found["b"].value == pytest.approx(log(wins / losses))
    assert found["a"].value + found["b"].value == pytest.approx(0, abs=1e-9)
    assert found["a"].standard_error == pytest.approx(sqrt(1 / wins + 1 / losses) / 2)
    assert list(found) == sorted(found, key=lambda name: -found[name].value)


TRUE = {"turbo": 0.9, "base": 0.4, "small": -0.3, "older": -1.0}


def tournament(count: int, seed: int, tied: float = 0.0) -> list[VoteCounts]:
    generator, played = torch.Generator().manual_seed(seed), []
    for first, second in combinations(TRUE, 2):
        chance = torch.sigmoid(torch.tensor(TRUE[first] - TRUE[second]))
        decided = (torch.rand(count, generator=generator) >= tied).sum()
        wins = int((torch.rand(int(decided), generator=generator) < chance).sum())
        played.append(votes(first, second, wins, int(decided) - wins, count - int(decided)))
    return played


def test_strengths_are_found_within_their_intervals():
    hits = [
        interval.low <= TRUE[name] <= interval.high
        for seed in range(100)
        for name, estimate in strengths(tournament(60, seed)).items()
        for interval in [estimate.interval]
    ]
    assert 0.92 <= sum(hits) / len(hits) <= 0.98
    assert list(strengths(tournament(1000, 0))) == list(TRUE)


def test_strengths_are_most_likely():
    """At the maximum every model's expected votes are its votes."""
    played = tournament(50, 0, tied=0.2)
    found = strengths(played)
    for name in TRUE:
        surplus = 0.0
        for pair in played:
            chance = 1 / (1 + pow(2.718281828459045, found[pair.second].value - found[pair.first].value))
            gap = pair.for_first + pair.ties / 2 - chance * pair.count
            surplus += gap * ((name == pair.first) - (name == pair.second))
        assert surplus == pytest.approx(0, abs=1e-4)


def test_who_is_named_first_and_how_votes_are_split_does_not_matter():
    played = tournament(50, 1)
    turned = [votes(v.second, v.first, v.for_second, v.for_first, v.ties) for v in reversed(played)]
    halves = [
        part
        for v in played
        for part in (votes(v.first, v.second, v.for_first, 0), votes(v.first, v.second, 0, v.for_second))
    ]
    found = strengths(played)
    for other in (strengths(turned), strengths(halves)):
        assert list(other) == list(found)
        for name, estimate in found.items():
            assert other[name] == pytest.approx(estimate, abs=1e-6)


def test_ties_draw_models_together():
    def gap(ties: int) -> float:
        found = strengths([votes("a", "b", 30, 10, ties)])
        return found["a"].value - found["b"].value

    assert gap(0) > gap(40) > gap(400) > 0


@pytest.mark.parametrize(
    ("played", "message"),
    [
        ([("a", "b", 5, 0)], "no vote ever went to b against the others, so 'b' may be weaker than 'a'"),
        ([("a", "b", 5, 3), ("c", "d", 5, 3)], "no vote ever went to"),
        ([("a", "b", 5, 3), ("a", "c", 2, 0), ("b", "c", 4, 0)], "no vote ever went to c against the others"),
        ([("a", "b", 0, 0)], "no vote ever went to"),
        ([], "at least two models"),
    ],
)
def test_strengths_without_bound_are_refused(played, message):
    with pytest.raises(InputError, match=message):
        strengths([votes(*pair) for pair in played])
