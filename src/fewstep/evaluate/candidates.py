"""The models of an evaluation or comparison with their settings, as in `blocks-base` or `blocks-turbo:steps=4`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL.Image import Image

from fewstep.errors import InputError, unknown
from fewstep.evaluate.image_cache import CachedImages, ImageCache
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pipeline.request import Progress, TaskOptions
from fewstep.tables import Cell

FEW_STEPS = (1, 4)
"""Step counts at which few-step models are evaluated, and beside them the model that was not distilled."""
BATCH = 4
SETTINGS: dict[str, type] = {"steps": int, "guidance_scale": float, "sampler": str, "schedule": str}
"""Settings of a candidate of `fewstep evaluate`, with their types."""
COMPARE_SETTINGS = SETTINGS | {"eta": float, "width": int, "height": int}
"""Settings of a candidate of `fewstep compare`."""
SHARED_SETTINGS = ("task", "model", "prompt", "seed")

LoadCache = Callable[[str], ImageCache]
"""From a model's name to the cache of its images."""


class Candidate(NamedTuple):
    """A model (name, folder, file or hub id) and the `settings` that replace its defaults.

    `label` names it on charts: the text it was parsed from, with a path cut down to its last part.
    """

    label: str
    model: str
    settings: TaskOptions


def parse_candidate(text: str, known: Mapping[str, type] = SETTINGS) -> Candidate:
    """The candidate written as MODEL or MODEL:name=value,name=value.

    Raises InputError for settings that are not in `known`, and for values that are not of their type.
    """
    model, *given = re.split(r":(?=[a-z_]+=)", text, maxsplit=1)  # paths may hold a colon
    settings = dict(_setting(part, text, known) for part in given[0].split(",")) if given else {}
    name = Path(model).name if Path(model).exists() else model
    return Candidate(":".join([name, *given]), model, cast(TaskOptions, settings))


def distinct_candidates(texts: Sequence[str]) -> list[Candidate]:
    """The candidates of a comparison; InputError for fewer than two, and for two with the same label."""
    if len(texts) < 2:
        raise InputError(f"{len(texts)} models; name two or more, as: fewstep compare blocks-base blocks-base:steps=2")
    candidates = [parse_candidate(text, COMPARE_SETTINGS) for text in texts]
    labels = [candidate.label for candidate in candidates]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two models would be called {label!r}; give one a setting, or its folder another name")
    return candidates


def generate_images(
    candidate: Candidate, pipe: Pipeline, prompts: Sequence[str], *, seed: int, on_step: Callable[[Progress], None]
) -> tuple[dict[str, Any], list[Image]]:
    """A candidate's resolved settings, and its image of each prompt i from `seed` + i; `pipe` is the loaded model."""
    options: Any = candidate.settings
    images: list[Image] = []
    settings: dict[str, Any] = {}
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        seeds = range(seed + start, seed + start + len(batch))
        result = pipe.text_to_image(batch, seed=seeds, on_step=on_step, **options)
        images += result.images
        settings = {name: value for name, value in result.settings.items() if name not in SHARED_SETTINGS}
    return {"model": candidate.model, **settings}, images


@dataclass(frozen=True, kw_only=True)
class LoadedCandidate:
    """A candidate whose model is loaded: the cache that generates its images, and the settings to generate with."""

    cache: ImageCache
    options: TaskOptions

    @property
    def label(self) -> str:
        """`blocks-turbo, 4 steps`, with the other settings that are not the model's own."""
        steps = self.options.get("steps") or self.cache.pipe.spec.defaults.steps
        others = [f"{name} {value}" for name, value in self.options.items() if name != "steps"]
        return ", ".join([self.cache.name, f"{steps} step{'s' * (steps > 1)}", *others])

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> CachedImages:
        """As `ImageCache.generate`."""
        return self.cache.generate(prompts, seeds, self.options)

    def row(self, image_sets: Sequence[CachedImages]) -> dict[str, Cell]:
        """A table row: the model, its settings, and how fast it generated `image_sets`."""
        networks, settings = self.cache.pipe.networks, image_sets[0].settings
        count, seconds = sum(each.generated for each in image_sets), sum(each.seconds for each in image_sets)
        judged = (networks.unet, networks.autoencoder, *networks.text_encoders)
        return {
            "model": self.label,
            "weights": self.cache.digest,
            "parameters": sum(p.numel() for network in judged for p in network.parameters()),
            "sampler": f"{settings['sampler']} ({settings['schedule']})",
            "guidance": f"{settings['guidance_scale']:g}",
            "pixels": f"{settings['width']} x {settings['height']}",
            "black": sum(each.black for each in image_sets),
            "pictures/s": count / seconds if count else None,
        }


def load_candidates(texts: Sequence[str], base: str, load_cache: LoadCache) -> list[LoadedCandidate]:
    """The candidates written in `texts`, `base` being the first; each model is loaded once.

    A model that takes at most 4 steps by default is evaluated at 1 and at 4, and then `base` is too, beside its own
    default: that shows what distillation gave. InputError for an unknown setting.
    """
    candidates = [parse_candidate(text) for text in dict.fromkeys([base, *texts])]
    models = [candidate.model for candidate in candidates]
    caches = {model: load_cache(model) for model in dict.fromkeys(models)}
    quick = {model for model, cache in caches.items() if cache.pipe.spec.defaults.steps <= max(FEW_STEPS)}
    runs = list[tuple[str, TaskOptions]]()
    for _, model, settings in candidates:
        runs += _few_step_runs(model) if model in quick and not settings else [(model, settings)]
    if quick - {models[0]}:
        runs += _few_step_runs(models[0])
    unique = [run for i, run in enumerate(runs) if run not in runs[:i]]
    return [LoadedCandidate(cache=caches[model], options=options) for model, options in unique]


def _few_step_runs(model: str) -> list[tuple[str, TaskOptions]]:
    return [(model, {"steps": steps}) for steps in FEW_STEPS]


def _setting(part: str, text: str, known: Mapping[str, type]) -> tuple[str, Any]:
    name, _, value = part.strip().partition("=")
    if name not in known:
        raise InputError(f"{text!r}: {unknown('setting', name, known)}")
    try:
        return name, known[name](value)
    except ValueError as error:
        raise InputError(f"{text!r}: {name} {value!r} is not a number") from error
