"""Measuring models over guidance scales, and the report and chart of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.blockworld import captions, scenes
from fewstep.charts import require_matplotlib
from fewstep.errors import InputError
from fewstep.evaluate.blocks.suite import rendered
from fewstep.evaluate.image_cache import Easel
from fewstep.evaluate.pareto.chart import write_chart
from fewstep.evaluate.pareto.front import SAMPLER, SCALES, STEPS, Point, knee
from fewstep.metrics.clip_score import Clip, clip_scores, mean_score
from fewstep.metrics.distances import distances
from fewstep.metrics.features import Features
from fewstep.metrics.pixels import PictureFiles, Pictures, picture_files
from fewstep.pipeline.request import TaskOptions
from fewstep.tables import csv_text, machine, table, write_text

SEED, REAL_SEED = 2027, 5_300_000_000


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is drawn and what it is compared with: prompts, and real pictures, in words `said`."""

    prompts: Sequence[str]
    real: Pictures
    said: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How it is drawn: guidance scales, steps, sampler, and the side in pixels or None for the model's own."""

    scales: Sequence[float] = SCALES
    steps: int = STEPS
    sampler: str = SAMPLER
    side: int | None = None


def subject(count: int, prompts: Path | None, real: Path | None, *, side: int, renders: int) -> Subject:
    """`count` prompts and real pictures: of files that are the user's, or of blockworld, with as many `renders`.

    Raises InputError for one of the two without the other, for too few prompts, and for a folder without pictures.
    """
    if prompts is not None and real is not None:
        return _own(_lines(prompts, count), prompts, real)
    if prompts is not None or real is not None:
        raise InputError("prompts and real pictures belong together; give both --prompts and --real, or neither")
    said = captions(scenes(count, seed=SEED, split="heldout"), seed=SEED, style="canonical")
    pictures = rendered(renders, side, seed=REAL_SEED, split="heldout")
    return Subject(
        prompts=said, real=pictures, said=f"held-out block captions, {len(pictures)} renders of other scenes"
    )


def _own(lines: Sequence[str], prompts: Path, real: Path) -> Subject:
    files = picture_files(real)
    said = f"prompts of {prompts.name}, the {len(files)} pictures in {real.name}"
    return Subject(prompts=lines, real=PictureFiles(files), said=said)


def _lines(path: Path, count: int) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts in {path} cannot be read: {error}") from error
    if len(lines) < count:
        raise InputError(f"{path} holds {len(lines)} prompts for {count} pictures; give more, or --count {len(lines)}")
    return lines[:count]


class Scales:
    """Measures models at guidance scales: on one subject, with one CLIP and one network's features."""

    def __init__(self, subject: Subject, how: Sweep, clip: Clip, features: Features) -> None:
        self.subject, self.how, self.clip, self.features = subject, how, clip, features
        self.texts, self.real = clip.texts(subject.prompts), features.of(subject.real)

    def points(self, easel: Easel) -> list[Point]:
        """A point for each scale; the seed of picture i is i at each."""
        return [self._point(easel, scale) for scale in self.how.scales]

    def _point(self, easel: Easel, scale: float) -> Point:
        how, prompts = self.how, self.subject.prompts
        options: TaskOptions = {"guidance_scale": scale, "steps": how.steps, "sampler": how.sampler}
        drawn = easel.draw(prompts, range(len(prompts)), options | {"width": how.side, "height": how.side})
        return Point(
            scale=scale,
            clip=mean_score(clip_scores(self.clip.images(drawn.pictures), self.texts)),
            distances=distances(self.features.of(drawn.pictures), self.real, str(self.features.card)),
            black=drawn.black,
        )


def write_pareto(easels: Sequence[Easel], scales: Scales, folder: Path) -> Path:
    """Measure models and write `pareto.md`, `.csv`, `.svg` and `.png` into `folder`; the path of the report."""
    require_matplotlib()
    curves = {easel.name: scales.points(easel) for easel in easels}
    rows = [point.row(name) for name, points in curves.items() for point in points]
    write_text(folder / "pareto.csv", csv_text(rows))
    how, features, clip = scales.how, scales.features.card, scales.clip.card
    drawn = f"{how.steps} {how.sampler.upper()} steps, {len(scales.subject.prompts)} pictures a point"
    title = f"{drawn}\nFID by {features.name}, CLIP score by {clip.name}"
    write_chart(curves, title, [folder / "pareto.svg", folder / "pareto.png"])
    best = [f"{name}: guidance {knee(points).scale:g}" for name, points in curves.items()]
    text = [
        f"# FID against CLIP score: {', '.join(curves)}",
        f"{drawn}: {scales.subject.said}. FID and KID by {features}; CLIP score (100 times the mean cosine) by {clip}. "
        f"Intervals are 95 %. {machine()}.",
        "![the chart](pareto.svg)",
        table(rows),
        f"Nearest to the best of both: {'; '.join(best)}.",
        "\n".join(
            f"- {name}, {said}" for name, points in curves.items() for point in points for said in point.doubts()
        ),
    ]
    write_text(folder / "pareto.md", "\n\n".join(filter(None, text)) + "\n")
    return folder / "pareto.md"
