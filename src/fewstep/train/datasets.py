"""Sources of captioned pictures or latents: pure functions of a micro-batch's seed, step and rows."""

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
    """Captions with pictures (B, 3, H, W) in [-1, 1], or instead with scaled latents (B, 4, h, w).

    `sizes` (B, 6), for SDXL: original size, crop and target size, height first.
    """

    captions: Sequence[str]
    pictures: Tensor | None = None
    latents: Tensor | None = None
    sizes: Tensor | None = None
    trajectories: TrajectoryBatch | None = None


class TrajectoryBatch(NamedTuple):
    """A teacher's sampling trajectories for the captions.

    `points` (B, K, 4, h, w): noised latents at the K time steps of the few-step student, pure noise last. `end`
    (B, 4, h, w): the latents that the trajectory ends at.
    """

    points: Tensor
    end: Tensor


class Source(Protocol):
    """A data set: a pure function from a micro-batch to its captioned pictures or latents."""

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """The `micro_batch.count` rows of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Blockworld:
    """Scenes of blockworld, rendered on the fly and never twice; `single`: the share with one object."""

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
        texts = captions(drawn, seed=seed, style="varied" if self.varied else "canonical")
        require_train(drawn)
        return CaptionedBatch(pictures=render(drawn[rows], self.size), captions=texts[rows])


@dataclass(frozen=True, kw_only=True)
class ShardDataset:
    """The pictures in a folder of `fewstep data prepare` that pass the filter `rule`; each once an epoch."""

    folder: Path
    rule: Filter | None = None

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `Source`."""
        return _captioned_batch(self.shards().read(self.indices(micro_batch)))

    def shards(self) -> Shards:
        """The folder, opened once."""
        return _opened(self.folder)

    def indices(self, micro_batch: MicroBatch) -> Indices:
        """The numbers of a micro-batch's pictures, all of one size."""
        batch = _planned(self.folder, self.rule, micro_batch.whole, micro_batch.seed).batch(micro_batch.step)
        return batch.indices[micro_batch.first : micro_batch.first + micro_batch.count]


@dataclass(frozen=True, kw_only=True)
class CachedLatents:
    """Latents sampled from cached moments of a `ShardDataset`: no picture is decoded or encoded."""

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
    """A source that reads the next step's batch in a thread; `waited_seconds` is the time spent waiting for it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waited_seconds = 0.0
        self.coming: dict[MicroBatch, Future[CaptionedBatch]] = {}
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `Source`. An error in reading is raised here; nothing is read under the caller's autocast."""
        started = time.monotonic()
        batch = (self.coming.pop(micro_batch, None) or self.reader.submit(self.source.batch, micro_batch)).result()
        self.waited_seconds += time.monotonic() - started
        following = replace(micro_batch, step=micro_batch.step + 1)
        if following not in self.coming:
            self.coming[following] = self.reader.submit(self.source.batch, following)
        return batch
