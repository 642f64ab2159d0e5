"""Where training pictures come from; which ones a part of a step gets depends on its seed and step alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.blockworld import captions, render, require_train, scenes
from fewstep.data.batches import BatchPlan, batch_plan
from fewstep.data.cache import Cache
from fewstep.data.filters import Filter
from fewstep.data.shards import Indices, Sample, Shards, open_shards, stacked_images
from fewstep.train.plan import MicroBatch, mixed_seed


@dataclass(frozen=True, kw_only=True)
class CaptionedBatch:
    """Captioned pictures (B, 3, H, W) in [-1, 1], or instead their scaled latents (B, 4, h, w).

    `sizes` (B, 6), for SDXL: original size, crop and target size, height first.
    """

    captions: Sequence[str]
    pictures: Tensor | None = None
    latents: Tensor | None = None
    sizes: Tensor | None = None
    trajectories: TrajectoryBatch | None = None


class TrajectoryBatch(NamedTuple):
    """What a teacher made of the captions: `points` (B, K, 4, h, w) on its way from noise, the noise itself last.

    They are latents with noise at the K time steps of the few-step student; `end` (B, 4, h, w) is where it came to.
    """

    points: Tensor
    end: Tensor


class Source(Protocol):
    """Gives each part of a step its examples: a pure function of the part."""

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """`part.count` of them."""


@dataclass(frozen=True, kw_only=True)
class Blockworld:
    """Scenes of blockworld, drawn as they are asked for and never twice; `single`: the share with one object."""

    size: int = 64
    single: float = 0.35
    varied: bool = True

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `Source`."""
        seed, rows = (
            mixed_seed(micro_batch.seed, micro_batch.step, "scenes"),
            slice(micro_batch.first, micro_batch.first + micro_batch.count),
        )
        drawn = scenes(micro_batch.whole, seed=seed, single=self.single)
        said = captions(drawn, seed=seed, style="varied" if self.varied else "canonical")
        require_train(drawn)
        return CaptionedBatch(pictures=render(drawn[rows], self.size), captions=said[rows])


@dataclass(frozen=True, kw_only=True)
class ShardDataset:
    """The pictures of a folder that `fewstep data prepare` made, those that `rule` keeps; each once an epoch."""

    folder: Path
    rule: Filter | None = None

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `Source`."""
        return _captioned_batch(self.shards().read(self.indices(micro_batch)))

    def shards(self) -> Shards:
        """The folder, opened once."""
        return _opened(self.folder)

    def indices(self, micro_batch: MicroBatch) -> Indices:
        """Which pictures a part gets; all of one size."""
        batch = _planned(self.folder, self.rule, micro_batch.whole, micro_batch.seed).batch(micro_batch.step)
        return batch.indices[micro_batch.first : micro_batch.first + micro_batch.count]


@dataclass(frozen=True, kw_only=True)
class CachedLatents:
    """The same from a cache of the latents' moments: nothing is decoded or encoded again."""

    data: ShardDataset
    cache: Cache

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `Source`; latents are drawn anew each time."""
        indices = self.data.indices(micro_batch)
        moments, known = self.cache.read(indices), self.data.shards()
        mean, std = moments["mean"].float(), moments["std"].float()
        latents = mean + std * micro_batch.randn("latents", *mean.shape[1:])
        return CaptionedBatch(captions=known.captions(indices), latents=latents)


_opened = cache(open_shards)


@cache
def _planned(folder: Path, rule: Filter | None, size: int, seed: int) -> BatchPlan:
    return batch_plan(_opened(folder), batch_size=size, seed=seed, rule=rule)


def _captioned_batch(samples: Sequence[Sample]) -> CaptionedBatch:
    height, width = samples[0].image.shape[-2:]
    sizes = [[*sample.original_size, *sample.crop, height, width] for sample in samples]
    return CaptionedBatch(
        captions=[sample.caption for sample in samples],
        pictures=stacked_images(samples),
        sizes=torch.tensor(sizes, dtype=torch.float32),
    )


class Prefetcher:
    """A source that reads the next step's examples while this one's are computed with; `waited` in seconds."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waited_seconds = 0.0
        self.coming: dict[MicroBatch, Future[CaptionedBatch]] = {}
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="examples")

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `Source`. An error in reading is raised here; nothing is read under the caller's autocast."""
        started = time.monotonic()
        found = (self.coming.pop(micro_batch, None) or self.reader.submit(self.source.batch, micro_batch)).result()
        self.waited_seconds += time.monotonic() - started
        following = replace(micro_batch, step=micro_batch.step + 1)
        if following not in self.coming:
            self.coming[following] = self.reader.submit(self.source.batch, following)
        return found
