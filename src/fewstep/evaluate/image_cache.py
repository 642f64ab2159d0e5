"""Generates the images of an evaluation and caches them as files, so that an interrupted run resumes."""

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
from fewstep.metrics.pixels import ImageFiles, Images, is_black
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pipeline.request import TaskOptions
from fewstep.weights.auxiliary import DIGITS, weights_digest

BATCH = 25

ProgressCallback = Callable[[int, int], None]
"""Called after each batch with the number of images there are, and of those there will be."""


class CacheEntry(NamedTuple):
    """The file of an image, and the prompt and seed it is generated from."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class CachedImages:
    """Images, one for each prompt and seed, and how they were generated.

    `black` counts black images, NaN among them: they stay in every metric. `generated` is the number that was not in
    the cache, in `seconds` of wall time. `settings` are the pipeline's, without prompt and seed.
    """

    images: Images
    black: int
    generated: int
    seconds: float
    settings: dict[str, Any]


class ImageCache:
    """Generates images with a model, called `name` in reports, and caches them as PNG files in `folder`.

    A file's name is a digest of weights, settings, prompt and seed: a change of any of them is another image.
    """

    def __init__(self, name: str, pipe: Pipeline, folder: Path, on_progress: ProgressCallback | None = None) -> None:
        self.name, self.pipe, self.on_progress = name, pipe, on_progress
        networks = pipe.networks
        self.digest = weights_digest((networks.unet, networks.autoencoder, *networks.text_encoders))
        self.folder = folder / f"{pipe.spec.name}-{self.digest[:8]}"

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], options: TaskOptions) -> CachedImages:
        """One image for each of `prompts` and its seed; `options` are those of `Pipeline.text_to_image`."""
        settings = dict(self.pipe.start(prompts[0], **_with_seeds(options, seeds[:1])).settings)
        del settings["prompt"]
        entries = [CacheEntry(self._path(settings, p, s), p, s) for p, s in zip(prompts, seeds, strict=True)]
        missing = [entry for entry in dict.fromkeys(entries) if not entry.path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        started = perf_counter()
        for first in range(0, len(missing), BATCH):
            self._fill(missing[first : first + BATCH], options, settings)
            if self.on_progress is not None:
                self.on_progress(len(entries) - len(missing) + min(first + BATCH, len(missing)), len(entries))
        seconds = perf_counter() - started
        images = ImageFiles([entry.path for entry in entries])
        black = sum(map(is_black, images))
        return CachedImages(images=images, black=black, generated=len(missing), seconds=seconds, settings=settings)

    def _path(self, settings: dict[str, Any], prompt: str, seed: int) -> Path:
        text = json.dumps([self.digest, settings, prompt, seed], sort_keys=True)
        return self.folder / f"{sha256(text.encode()).hexdigest()[:DIGITS]}.png"

    def _fill(self, entries: Sequence[CacheEntry], options: TaskOptions, settings: dict[str, Any]) -> None:
        """Generate and save; one by one where a batch is not finite, and black where a single image is not."""
        prompts, seeds = [entry.prompt for entry in entries], [entry.seed for entry in entries]
        images: Sequence[Image.Image]
        try:
            images = self.pipe.text_to_image(prompts, **_with_seeds(options, seeds)).images
        except NotFiniteError:
            if len(entries) > 1:
                for entry in entries:
                    self._fill([entry], options, settings)
                return
            images = [Image.new("RGB", (settings["width"], settings["height"]))]
        for entry, image in zip(entries, images, strict=True):
            save_png(image, entry.path, {**settings, "prompt": entry.prompt, "seed": entry.seed})


def _with_seeds(options: TaskOptions, seeds: Sequence[int]) -> TaskOptions:
    return options | TaskOptions(seed=seeds)
