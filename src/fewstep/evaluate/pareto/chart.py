"""The chart of FID against CLIP score, one line for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.charts import CHART_STYLE, require_matplotlib, save_figure
from fewstep.evaluate.pareto.front import Point, knee


def write_chart(curves: Mapping[str, Sequence[Point]], title: str, paths: Sequence[Path]) -> None:
    """Write the chart in the formats that the endings of `paths` name (.svg, .png), each file whole or not at all.

    Each point bears its guidance scale, its bars are 95 % intervals, and the ring is the model's knee. Raises
    MissingExtraError without matplotlib.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(CHART_STYLE):
        figure = matplotlib.figure.Figure(figsize=(7.2, 5.2), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(curves.items()):
            _add(axes, name, sorted(points, key=lambda point: point.scale), f"C{i}")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="CLIP score (further right is better)", ylabel="FID (lower is better)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        for path in paths:
            save_figure(figure, path)


def _add(axes: Any, name: str, points: Sequence[Point], colour: str) -> None:
    clips, fids = [p.clip.interval for p in points], [p.distances.fid for p in points]
    axes.errorbar(
        [clip.value for clip in clips],
        [fid.value for fid in fids],
        xerr=[clip.high - clip.value for clip in clips],
        yerr=[[fid.value - fid.low for fid in fids], [fid.high - fid.value for fid in fids]],
        color=colour,
        marker="o",
        markersize=4,
        elinewidth=0.6,
        label=name,
    )
    for point in points:
        place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8, "color": colour}
        axes.annotate(f"{point.scale:g}", (point.clip.value, point.fid), **place)
    best = knee(points)
    axes.plot(best.clip.value, best.fid, marker="o", markersize=12, fillstyle="none", color=colour)
