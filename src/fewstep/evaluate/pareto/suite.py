"""FID and CLIP score of models over guidance scales, with report and chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.blockworld import captions, scenes
from fewstep.charts import require_matplotlib
from fewstep.errors import InputError
from fewstep.evaluate.blocks.suite import render_images
from fewstep.evaluate.environment import machine
from fewstep.evaluate.image_cache import ImageCache
from fewstep.evaluate.pareto.chart import write_chart
from fewstep.evaluate.pareto.front import SAMPLER, SCALES, STEPS, Point, knee
from fewstep.evaluate.prompts import read_prompts
from fewstep.metrics.clip_score import Clip, clip_scores, mean_score
from fewstep.metrics.distances import distances
from fewstep.metrics.features import Features
from fewstep.metrics.pixels import ImageFiles, Images, image_files
from fewstep.pipeline.request import TaskOptions
from fewstep.tables import csv_text, table, write_text

SEED, REAL_SEED = 2027, 5_300_000_000


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts, and the real images that the generated ones are compared with; `description` is for the report."""

    prompts: Sequence[str]
    real: Images
    description: str


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Guidance scales, steps, sampler, and the images' side in pixels (None: the model's default)."""

    scales: Sequence[float] = SCALES
    steps: int = STEPS
    sampler: str = SAMPLER
    side: int | None = None


def prompt_set(count: int, prompts: Path | None, real: Path | None, *, side: int, renders: int) -> PromptSet:
    """`count` prompts and real images: the user's files, or captions of block scenes and as many `renders` of others.

    Raises InputError for one of the two without the other, for too few prompts, and for a folder without images.
    """
    if prompts is not None and real is not None:
        return _own(_first_prompts(prompts, count), prompts, real)
    if prompts is not None or real is not None:
        raise InputError("prompts and real images belong together; give both --prompts and --real, or neither")
    texts = captions(scenes(count, seed=SEED, split="heldout"), seed=SEED, style="canonical")
    images = render_images(renders, side, seed=REAL_SEED, split="heldout")
    return PromptSet(
        prompts=texts, real=images, description=f"held-out block captions, {len(images)} renders of other scenes"
    )


def _own(lines: Sequence[str], prompts: Path, real: Path) -> PromptSet:
    files = image_files(real)
    description = f"prompts of {prompts.name}, the {len(files)} images in {real.name}"
    return PromptSet(prompts=lines, real=ImageFiles(files), description=description)


def _first_prompts(path: Path, count: int) -> list[str]:
    prompts = read_prompts(path, count)
    if len(prompts) < count:
        few = len(prompts)
        raise InputError(f"{path} holds {few} prompts for {count} images; give more, or --count {few}")
    return prompts


class GuidanceSweep:
    """Measures models at several guidance scales, on one prompt set, with one CLIP and one feature network."""

    def __init__(self, prompt_set: PromptSet, settings: SweepSettings, clip: Clip, features: Features) -> None:
        self.prompt_set, self.settings, self.clip, self.features = prompt_set, settings, clip, features
        self.texts, self.real = clip.texts(prompt_set.prompts), features.of(prompt_set.real)

    def points(self, cache: ImageCache) -> list[Point]:
        """A point for each scale; the seed of image i is i at each."""
        return [self._point(cache, scale) for scale in self.settings.scales]

    def _point(self, cache: ImageCache, scale: float) -> Point:
        settings, prompts = self.settings, self.prompt_set.prompts
        options: TaskOptions = {"guidance_scale": scale, "steps": settings.steps, "sampler": settings.sampler}
        size: TaskOptions = {"width": settings.side, "height": settings.side}
        generated = cache.generate(prompts, range(len(prompts)), options | size)
        return Point(
            scale=scale,
            clip=mean_score(clip_scores(self.clip.images(generated.images), self.texts)),
            distances=distances(self.features.of(generated.images), self.real, str(self.features.network_id)),
            black=generated.black,
        )


def write_pareto(caches: Sequence[ImageCache], sweep: GuidanceSweep, folder: Path) -> Path:
    """Measure models and write `pareto.md`, `.csv`, `.svg` and `.png` into `folder`; the path of the report."""
    require_matplotlib()
    curves = {cache.name: sweep.points(cache) for cache in caches}
    rows = [point.row(name) for name, points in curves.items() for point in points]
    write_text(folder / "pareto.csv", csv_text(rows))
    settings, features, clip = sweep.settings, sweep.features.network_id, sweep.clip.network_id
    run = f"{settings.steps} {settings.sampler.upper()} steps, {len(sweep.prompt_set.prompts)} images a point"
    title = f"{run}\nFID by {features.name}, CLIP score by {clip.name}"
    write_chart(curves, title, [folder / "pareto.svg", folder / "pareto.png"])
    best = [f"{name}: guidance {knee(points).scale:g}" for name, points in curves.items()]
    text = [
        f"# FID against CLIP score: {', '.join(curves)}",
        f"{run}: {sweep.prompt_set.description}. FID and KID by {features}; CLIP score (100 times the mean cosine) by "
        f"{clip}. Intervals are 95 %. {machine()}.",
        "![the chart](pareto.svg)",
        table(rows),
        f"Nearest to the best of both: {'; '.join(best)}.",
        "\n".join(
            f"- {name}, {text}" for name, points in curves.items() for point in points for text in point.warnings()
        ),
    ]
    write_text(folder / "pareto.md", "\n\n".join(filter(None, text)) + "\n")
    return folder / "pareto.md"
