"""Preference statistics of votes between pairs of models: shares, and Bradley-Terry strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import InputError
from fewstep.metrics.intervals import Estimate, Interval, share_interval

NEWTON_STEPS = 100
SMALLEST_GAIN = 1e-12
"""Log-likelihood per vote: the fit ends when a step gains less."""


@dataclass(frozen=True, kw_only=True)
class VoteCounts:
    """The votes of one comparison: for `first`, for `second`, and for neither.

    Raises InputError for negative counts, or a model compared with itself.
    """

    first: str
    second: str
    for_first: int
    for_second: int
    ties: int = 0

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise InputError(f"{self.first!r} is compared with itself; name two models")
        if min(self.for_first, self.for_second, self.ties) < 0:
            counts = f"{self.for_first}, {self.for_second} and {self.ties}"
            raise InputError(f"votes {counts} for {self.first!r}, {self.second!r} and neither: none can be negative")

    @property
    def count(self) -> int:
        """All votes, ties among them."""
        return self.for_first + self.for_second + self.ties


def preferred(votes: VoteCounts) -> Interval:
    """The share of votes for `first`, each tie being half a vote for either, with Wilson's interval.

    Ties make the interval wider than it need be. Raises InputError where nobody has voted.
    """
    return share_interval((votes.for_first + votes.ties / 2) / max(votes.count, 1), votes.count)


def strengths(comparisons: Sequence[VoteCounts]) -> dict[str, Estimate]:
    """The Bradley-Terry strength of every model compared, the strongest first, on a logarithmic scale with mean 0.

    A model is preferred over another with odds exp(difference); 400 / log(10) times a strength is its Elo rating.
    Each tie is half a vote for either, which makes the standard errors larger than they need be. They are those
    of maximum likelihood, and of a strength relative to the mean of all.

    Raises InputError where the votes leave a strength unbounded: some models won every vote against all others,
    or were never compared with them (the condition of doi:10.1214/aos/1079120141, sec. 2).
    """
    names = list(dict.fromkeys(name for votes in comparisons for name in (votes.first, votes.second)))
    points = _points(comparisons, names)
    _check_bounded(points, names)
    theta = _most_likely(points)
    errors = _covariance(theta, points).diagonal().sqrt()
    estimates = {name: Estimate(float(theta[i]), float(errors[i])) for i, name in enumerate(names)}
    return dict(sorted(estimates.items(), key=lambda item: -item[1].value))


def _points(comparisons: Sequence[VoteCounts], names: Sequence[str]) -> Tensor:
    """(K, K): the votes for model i against model j, with half the ties."""
    points = torch.zeros(len(names), len(names), dtype=torch.float64)
    for votes in comparisons:
        i, j = names.index(votes.first), names.index(votes.second)
        points[i, j] += votes.for_first + votes.ties / 2
        points[j, i] += votes.for_second + votes.ties / 2
    return points


def _check_bounded(points: Tensor, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise InputError("there are no votes to take strengths from; compare at least two models")
    beaten = (points > 0) | torch.eye(len(names), dtype=torch.bool)
    for _ in names:  # whom each model beat, whom those beat, ...
        beaten = (beaten.double() @ beaten.double()) > 0
    if not beaten.all():
        i, j = (~beaten).nonzero()[0].tolist()
        below = [name for name, reached in zip(names, beaten[:, j].tolist(), strict=True) if not reached]
        raise InputError(
            f"no vote ever went to {', '.join(below)} against the others, so {names[i]!r} may be weaker than "
            f"{names[j]!r} by any amount; collect more votes, or report the shares alone"
        )


def _most_likely(points: Tensor) -> Tensor:
    """(K,) strengths with mean 0, by Newton's method; a step that overshoots is halved."""
    theta, least = points.new_zeros(len(points)), SMALLEST_GAIN * points.sum()
    for _ in range(NEWTON_STEPS):
        gradient = (points - (points + points.T) * _chances(theta)).sum(1)
        step = _covariance(theta, points) @ gradient
        before = _log_likelihood(theta, points)
        while _log_likelihood(theta + step, points) < before - least:
            step = step / 2
        theta = theta + step - step.mean()  # rounding would let all drift together
        if _log_likelihood(theta, points) - before < least:
            break
    return theta


def _chances(theta: Tensor) -> Tensor:
    """(K, K): how likely model i is preferred over model j."""
    return torch.sigmoid(theta[:, None] - theta)


def _log_likelihood(theta: Tensor, points: Tensor) -> Tensor:
    return (points * F.logsigmoid(theta[:, None] - theta)).sum()


def _covariance(theta: Tensor, points: Tensor) -> Tensor:
    """(K, K) of the strengths around their mean: the pseudo-inverse of Fisher's information.

    The information is a graph Laplacian. Its null space, a shift of all strengths, is filled with a constant and
    taken out again: a cutoff would have to tell it from pairs that are nearly decided.
    """
    chances = _chances(theta)
    weights = (points + points.T) * chances * chances.T
    information = torch.diag(weights.sum(1)) - weights
    mean, fill = torch.full_like(weights, 1 / len(weights)), information.trace()
    covariance: Tensor = torch.linalg.inv(information + fill * mean) - mean / fill
    return covariance
