"""The results of a study: the chart and the table of its votes, and a summary in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.compare.chart import sample_line, write_chart
from fewstep.compare.judges import JUDGES, judge_votes
from fewstep.compare.study import read_study
from fewstep.compare.tally import Outcome, aggregate_votes
from fewstep.compare.votes import read_votes
from fewstep.errors import InputError
from fewstep.metrics.bradley_terry import strengths
from fewstep.metrics.intervals import NORMAL_95
from fewstep.tables import csv_text, write_text


def write_report(folder: Path, files: Sequence[Path], judge: str | None) -> tuple[Outcome, list[Path]]:
    """Count the votes in `files` on the study in `folder`, and those of a `judge`; the outcome and the paths written.

    Writes `preference.svg`, `.png` and `.csv` into `folder`, or `preference-judged-by-model` where a model voted.
    """
    study = read_study(folder)
    votes = [read_votes(file, study.digest, {pair.id for pair in study.pairs}) for file in files]
    if judge is not None:
        votes.append(judge_votes(study, folder, JUDGES[judge]()))
    outcome = aggregate_votes(study, votes)
    stem = folder / ("preference" if outcome.judged_by is None else "preference-judged-by-model")
    table = stem.with_suffix(".csv")
    write_text(table, csv_text(outcome.rows()))
    return outcome, [*write_chart(outcome, stem), table]


def summary(outcome: Outcome) -> str:
    """The results for people: a line for each pair of models, and strengths where there are three models or more."""
    lines = [outcome.title, *(tally.statement() for tally in outcome.tallies), sample_line(outcome)]
    if outcome.left_out:
        lines.append(f"left out, since they missed attention checks: {', '.join(outcome.left_out)}")
    return "\n".join([*lines, *_strengths(outcome)])


def _strengths(outcome: Outcome) -> list[str]:
    """Bradley-Terry strengths for each question with more than one pair; the reason where votes do not bound them."""
    lines = []
    for question in dict.fromkeys(tally.question for tally in outcome.tallies):
        counts = [tally.votes for tally in outcome.tallies if tally.question == question]
        if len(counts) < 2:
            continue
        try:
            estimates = strengths(counts)
        except InputError as error:
            lines.append(f"{question}, strengths: {error}")
            continue
        values = (f"{name} {value:+.2f} ± {NORMAL_95 * error:.2f}" for name, (value, error) in estimates.items())
        lines.append(f"{question}, Bradley-Terry strengths with 95 % intervals: {', '.join(values)}")
    return lines
