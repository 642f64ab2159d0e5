"""Aggregated votes of a study: preference shares with intervals, and agreement of the raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from fewstep.compare.study import SCRAMBLED, Study
from fewstep.compare.votes import CHOICES, QUESTIONS, RaterVotes, Vote
from fewstep.errors import InputError
from fewstep.metrics.agreement import kappa
from fewstep.metrics.bradley_terry import VoteCounts, preferred
from fewstep.tables import Cell

CHECKS_PASSED = 0.75
"""The share of right answers on the pairs that check attention, below which a rater is left out."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The votes on one question between two models.

    `prompts` counts those with a vote; `kappa` is the raters' agreement on all pairs of the question, None where it
    is not defined.
    """

    question: str
    votes: VoteCounts
    prompts: int
    kappa: float | None

    def statement(self) -> str:
        """One line for people: the share with its interval, and what it counts."""
        share, low, high = preferred(self.votes)
        return (
            f"{self.question}: {self.votes.first} over {self.votes.second} in {share:.3f} "
            f"(95 % interval {low:.3f} to {high:.3f}) of {self.votes.count} votes, {self.votes.ties} of them ties"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All tallies of a study, question by question; `left_out` are raters who failed the attention checks.

    `judged_by` names the model that voted; None where people did.
    """

    tallies: tuple[Tally, ...]
    raters: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    judged_by: str | None = None

    @property
    def title(self) -> str:
        """Who voted; every chart shows it."""
        if self.judged_by is not None:
            return f"Judged by model: {self.judged_by}"
        count = len(self.raters)
        return f"Human preference, {count} {'rater' if count == 1 else 'raters'}"

    def rows(self) -> list[dict[str, Cell]]:
        """The table: a row for each tally. `share` is that of the first model, with its 95 % interval."""
        return [self._row(tally) for tally in self.tallies]

    def _row(self, tally: Tally) -> dict[str, Cell]:
        votes, (share, low, high) = tally.votes, preferred(tally.votes)
        return {
            "question": tally.question,
            "first": votes.first,
            "second": votes.second,
            "for_first": votes.for_first,
            "ties": votes.ties,
            "for_second": votes.for_second,
            "share": share,
            "low": low,
            "high": high,
            "prompts": tally.prompts,
            "kappa": tally.kappa,
            "voted": "people" if self.judged_by is None else f"model: {self.judged_by}",
            "raters": len(self.raters),
            "left_out": len(self.left_out),
        }


def aggregate_votes(study: Study, all_votes: Sequence[RaterVotes]) -> Outcome:
    """The tallies of `all_votes`, without raters who answered under `CHECKS_PASSED` of their attention checks rightly.

    Raises InputError for no votes, for a rater who votes twice on the same, for people and models in one tally, and
    where nothing is left to count.
    """
    if not all_votes:
        raise InputError("there are no votes to count; name the files that the page saved")
    judges = {rater_votes.judged_by for rater_votes in all_votes}
    if len(judges) > 1:
        named = ", ".join(sorted("people" if judge is None else f"the model {judge!r}" for judge in judges))
        raise InputError(f"votes of {named} cannot be counted together; make a tally of each")
    _check_once(all_votes)
    attentive = [rater_votes for rater_votes in all_votes if _checks_passed(study, rater_votes) >= CHECKS_PASSED]
    tallies = tuple(tally for question in QUESTIONS for tally in _tallies_of(study, attentive, question))
    if not tallies:
        missed = f"; {len(all_votes) - len(attentive)} of {len(all_votes)} raters failed the attention checks"
        raise InputError(f"no vote is left to count{missed}")
    return Outcome(
        tallies=tallies,
        raters=tuple(rater_votes.rater for rater_votes in attentive),
        left_out=tuple(rater_votes.rater for rater_votes in all_votes if rater_votes not in attentive),
        judged_by=all_votes[0].judged_by,
    )


def _check_once(all_votes: Sequence[RaterVotes]) -> None:
    given = Counter(
        (rater_votes.rater, vote.pair, vote.question) for rater_votes in all_votes for vote in rater_votes.votes
    )
    for (rater, pair, question), times in given.items():
        if times > 1:
            raise InputError(
                f"{rater!r} votes {times} times on the {question} of pair {pair}; "
                "name each file once, and let raters have different names"
            )


def _checks_passed(study: Study, rater_votes: RaterVotes) -> float:
    """The share of right answers to attention checks; 1 where none was answered."""
    checks = {pair.id: pair for pair in study.pairs if pair.is_check}
    answers = [_chosen(checks[vote.pair].drawn_by, vote) for vote in rater_votes.votes if vote.pair in checks]
    return sum(answer not in ("tie", SCRAMBLED) for answer in answers) / len(answers) if answers else 1.0


def _chosen(drawn_by: tuple[str, str], vote: Vote) -> str:
    """The label of the model that the vote is for, or "tie"."""
    return (*drawn_by, "tie")[CHOICES.index(vote.choice)]


def _tallies_of(study: Study, all_votes: Sequence[RaterVotes], question: str) -> list[Tally]:
    pairs = {pair.id: pair for pair in study.pairs if not pair.is_check}
    ratings = {
        rater_votes.rater: {
            vote.pair: _chosen(pairs[vote.pair].drawn_by, vote)
            for vote in rater_votes.votes
            if vote.question == question and vote.pair in pairs
        }
        for rater_votes in all_votes
    }
    agreement = kappa({rater: chosen for rater, chosen in ratings.items() if chosen})
    tallies = []
    for first, second in combinations(study.models, 2):
        own = {name for name, pair in pairs.items() if set(pair.drawn_by) == {first, second}}
        if votes := [(pair, choice) for chosen in ratings.values() for pair, choice in chosen.items() if pair in own]:
            counts = Counter(choice for _, choice in votes)
            prompts = len({pairs[pair].prompt for pair, _ in votes})
            tally = _votes(first, second, counts)
            tallies.append(Tally(question=question, votes=tally, prompts=prompts, kappa=agreement))
    return tallies


def _votes(first: str, second: str, counts: Mapping[str, int]) -> VoteCounts:
    for_first, for_second, ties = (counts.get(choice, 0) for choice in (first, second, "tie"))
    return VoteCounts(first=first, second=second, for_first=for_first, for_second=for_second, ties=ties)
