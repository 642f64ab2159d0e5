"""Drawing the pictures that are judged: once each, kept as files, so that a run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from PIL import Image

from fewstep.errors import NotFiniteError
from fewstep.images import save_png
from fewstep.metrics.pixels import PictureFiles, Pictures, is_black
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pipeline.request import TaskOptions
from fewstep.weights.auxiliary import DIGITS, weights_digest

BATCH = 25

Told = Callable[[int, int], None]
"""Told how many pictures of how many there are."""


class Wanted(NamedTuple):
    """A picture to be drawn, and where it is kept."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Pictures, one for each prompt and seed, and how they came about.

    `black` counts those that show nothing, NaN among them: they stay in every measure. `fresh` were not in the cache
    and took `seconds`. `settings` is what the pipeline resolved, without prompt and seed.
    """

    pictures: Pictures
    black: int
    fresh: int
    seconds: float
    settings: dict[str, Any]


class Easel:
    """Draws with the model that a report calls `name`, and keeps what it drew in `folder`.

    A picture is known by weights, settings, prompt and seed: no other ones ever find it.
    """

    def __init__(self, name: str, pipe: Pipeline, folder: Path, told: Told | None = None) -> None:
        self.name, self.pipe, self.told = name, pipe, told
        parts = pipe.parts
        self.digest = weights_digest((parts.unet, parts.autoencoder, *parts.text_encoders))
        self.folder = folder / f"{parts.name}-{self.digest[:8]}"

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], options: TaskOptions) -> Drawn:
        """One picture for each of `prompts` and its seed; `options` are those of `Pipeline.text_to_image`."""
        settings = dict(self.pipe.start(prompts[0], **_with_seeds(options, seeds[:1])).settings)
        del settings["prompt"]
        wanted = [Wanted(self._path(settings, p, s), p, s) for p, s in zip(prompts, seeds, strict=True)]
        fresh = [one for one in dict.fromkeys(wanted) if not one.path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        started = perf_counter()
        for first in range(0, len(fresh), BATCH):
            self._fill(fresh[first : first + BATCH], options, settings)
            if self.told is not None:
                self.told(len(wanted) - len(fresh) + min(first + BATCH, len(fresh)), len(wanted))
        seconds = perf_counter() - started
        pictures = PictureFiles([one.path for one in wanted])
        black = sum(map(is_black, pictures))
        return Drawn(pictures=pictures, black=black, fresh=len(fresh), seconds=seconds, settings=settings)

    def _path(self, settings: dict[str, Any], prompt: str, seed: int) -> Path:
        text = json.dumps([self.digest, settings, prompt, seed], sort_keys=True)
        return self.folder / f"{sha256(text.encode()).hexdigest()[:DIGITS]}.png"

    def _fill(self, wanted: Sequence[Wanted], options: TaskOptions, settings: dict[str, Any]) -> None:
        """Draw and save; where NaN spoils a batch one by one, and black where one alone gives it."""
        prompts, seeds = [one.prompt for one in wanted], [one.seed for one in wanted]
        pictures: Sequence[Image.Image]
        try:
            pictures = self.pipe.text_to_image(prompts, **_with_seeds(options, seeds)).images
        except NotFiniteError:
            if len(wanted) > 1:
                for one in wanted:
                    self._fill([one], options, settings)
                return
            pictures = [Image.new("RGB", (settings["width"], settings["height"]))]
        for one, picture in zip(wanted, pictures, strict=True):
            save_png(picture, one.path, {**settings, "prompt": one.prompt, "seed": one.seed})


def _with_seeds(options: TaskOptions, seeds: Sequence[int]) -> TaskOptions:
    return options | TaskOptions(seed=seeds)
