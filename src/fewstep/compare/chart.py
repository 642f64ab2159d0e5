"""The preference chart: one bar for each pair of models, with ties and 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fewstep.charts import require_matplotlib, save_figure
from fewstep.compare.tally import Outcome, Tally
from fewstep.metrics.bradley_terry import preferred

FIRST, TIE, SECOND, INK, PALE = "#2f6f9f", "#d5d8dc", "#d9822b", "#1c2430", "#5b6673"
NAMES = {"quality": "Image quality", "alignment": "Prompt alignment"}
ROW, HEAD, TOP, BOTTOM, WIDTH = 0.5, 0.4, 0.55, 0.85, 8.6
"""Inches: a bar with its figures, the name of a question, the title, the caption, and the whole across."""
CAPTION = "Grey: ties. Dot: share for the model on the left, half of the ties in it, with its 95 % Wilson interval."


def write_chart(outcome: Outcome, stem: Path) -> list[Path]:
    """Write `stem`.svg and `stem`.png, and return their paths; the title says who voted.

    Raises MissingExtraError without matplotlib.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "fewstep", "font.family": "DejaVu Sans", "font.size": 9}):
        questions = [list(rows) for _, rows in groupby(outcome.tallies, key=lambda tally: tally.question)]
        height = TOP + BOTTOM + ROW * len(outcome.tallies) + HEAD * len(questions)
        figure = matplotlib.figure.Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0.22, BOTTOM / height, 0.56, 1 - (TOP + BOTTOM) / height))
        axes.set(xlim=(0, 100), ylim=(height - TOP - BOTTOM, 0))  # y in inches from the top
        _draw(axes, questions)
        _label(figure, outcome, height)
        paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
        for path in paths:
            save_figure(figure, path, dpi=160)
    return paths


def _draw(axes: Any, questions: Sequence[Sequence[Tally]]) -> None:
    y = 0.0
    for rows in questions:
        name, bottom = NAMES[rows[0].question], y + HEAD + ROW * len(rows)
        axes.text(50, y + 0.22, name, ha="center", va="center", fontsize=10, weight="bold", color=INK)
        axes.plot([50, 50], [y + HEAD - 0.04, bottom], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
        for number, tally in enumerate(rows):
            _bar(axes, tally, y + HEAD + ROW * number + 0.16)
        y = bottom
    axes.set(yticks=[], xticks=range(0, 101, 25))
    axes.set_xticklabels([f"{tick} %" for tick in range(0, 101, 25)], color=PALE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _bar(axes: Any, tally: Tally, y: float) -> None:
    """One bar: votes for the first model, ties, votes for the second; over it the share with its interval."""
    votes, left = tally.votes, 0.0
    for count, colour in ((votes.for_first, FIRST), (votes.ties, TIE), (votes.for_second, SECOND)):
        width = 100 * count / votes.count
        axes.barh(y, width, left=left, height=0.26, color=colour, edgecolor="white", linewidth=1, zorder=2)
        if width >= 5:
            text = axes.text(left + width / 2, y + 0.2, f"{width:.0f} %", ha="center", va="center", fontsize=7.5)
            text.set(color=PALE, zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        left += width
    share, low, high = (100 * value for value in preferred(votes))
    for style in ({"linewidth": 1.6}, {"linestyle": "none", "marker": "|", "markersize": 9, "markeredgewidth": 1.6}):
        axes.plot([low, high], [y, y], color=INK, zorder=4, **style)
    axes.plot([share], [y], marker="o", markersize=5, color=INK, zorder=5)
    for x, name, side, colour in ((-1.5, votes.first, "right", FIRST), (101.5, votes.second, "left", SECOND)):
        axes.text(x, y, _in_lines(name), ha=side, va="center", color=colour, weight="bold", fontsize=8.5)


def _in_lines(label: str) -> str:
    """The model on one line and its settings, smaller than a bar, on the next."""
    model, _, settings = label.partition(":")
    return "\n".join(filter(None, (model, settings.replace(",", ",\n").replace("guidance_scale", "guidance"))))


def _label(figure: Any, outcome: Outcome, height: float) -> None:
    figure.text(0.5, 1 - 0.3 / height, outcome.title, ha="center", va="center", fontsize=12, weight="bold", color=INK)
    lines = [CAPTION, sample_line(outcome)]
    for number, line in enumerate(lines):
        figure.text(0.5, (0.38 - 0.2 * number) / height, line, ha="center", va="center", fontsize=7.5, color=PALE)


def sample_line(outcome: Outcome) -> str:
    """One line: how many votes, raters and prompts, who was left out, and how far raters agree."""
    votes = sum(tally.votes.count for tally in outcome.tallies)
    people = f"{len(outcome.raters)} {'person' if len(outcome.raters) == 1 else 'people'}"
    prompts = max(tally.prompts for tally in outcome.tallies)
    by = people if outcome.judged_by is None else "a model"
    parts = [f"n = {votes} votes by {by} on {prompts} prompts, taken as independent"]
    if outcome.left_out:
        parts.append(f"{len(outcome.left_out)} left out for missed attention checks")
    agreement = {NAMES[tally.question].lower(): tally.kappa for tally in outcome.tallies if tally.kappa is not None}
    if agreement:
        parts.append("raters' kappa " + ", ".join(f"{value:.2f} ({name})" for name, value in agreement.items()))
    return "; ".join(parts) + "."
