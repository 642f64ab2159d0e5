"""The chart of block models side by side: prompt following, diversity and FID, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from fewstep.charts import CHART_STYLE, require_matplotlib, save_figure
from fewstep.evaluate.blocks.composition import READERS
from fewstep.evaluate.blocks.suite import BlockResults
from fewstep.metrics.intervals import Interval

UNKNOWN = Interval(nan, nan, nan)
GROUPS = ("one object, held out", "two objects, held out")


def write_chart(results: Sequence[BlockResults], title: str, paths: Sequence[Path]) -> None:
    """Write the chart in the formats that the endings of `paths` name; a row a model, all bars 95 % intervals.

    Raises MissingExtraError without matplotlib.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(CHART_STYLE):
        figure = matplotlib.figure.Figure(figsize=(11, 1.6 + 0.42 * len(results)), layout="constrained")
        right, varied, real = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1.1, 1))
        for i, (group, marker) in enumerate(zip(GROUPS, "os", strict=True)):
            for j, (reader, filled) in enumerate(zip(READERS, (True, False), strict=True)):
                shares = [_answer(one, group).exact(reader) for one in results]
                look = {"marker": marker, "color": f"C{i}", "mfc": f"C{i}" if filled else "white"}
                _dots(right, shares, shift=0.2 * i + 0.1 * j - 0.15, label=f"{group}; by the {reader}", **look)
        _dots(varied, [one.diversity.relative_to(results[0].diversity)["variance"] for one in results])
        _dots(real, [one.distances.fid if one.distances else UNKNOWN for one in results])
        right.set(xlabel="drawn right (further right is better)", xlim=(None, 1.02))
        varied.set(xlabel="diversity, as a share of the first")
        real.set(xlabel="FID (lower is better)")
        right.set_yticks(range(len(results)), [one.candidate.label for one in results])
        right.invert_yaxis()
        for axes in (right, varied, real):
            axes.grid(alpha=0.25)
        figure.suptitle(title, fontsize=9)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        for path in paths:
            save_figure(figure, path)


def _answer(one: BlockResults, group: str) -> Any:
    return next(answer for answer in one.answers if answer.question.group == group)


def _dots(axes: Any, values: Sequence[Interval], *, shift: float = 0.0, label: str | None = None, **look: str) -> None:
    """A dot with its interval on each model's row."""
    below, above = [v.value - v.low for v in values], [v.high - v.value for v in values]
    places = [i + shift for i in range(len(values))]
    axes.errorbar(
        [v.value for v in values], places, xerr=[below, above], ls="", label=label, **{"marker": "o", "ms": 5, **look}
    )
