"""Which pictures a training step gets: a pure function of the seed, the step and the batch's size.

Nothing is remembered between steps, so a run that goes on at step k needs nothing but k, and a rank that takes rows
r * b to (r + 1) * b of every batch sees what a single process would have had there.

Each bucket is an endless row of passes over its pictures, every pass in an order of its own, and is cut into batches
from the start. A pass that does not come out even lends its last pictures to a batch together with the first of the
next pass: nothing is dropped and nothing repeated. So after E epochs every picture has been drawn E times, or, if it
is among the fewer than `size` left over in its bucket, E - 1 times; its turn comes at the start of the next epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.data.buckets import Size
from fewstep.data.filters import Filter
from fewstep.data.shards import Indices, Shards
from fewstep.errors import InputError


class Batch(NamedTuple):
    """A step's pictures, all of one `size`: their numbers, (B,) int64, over all ranks."""

    size: Size
    indices: Indices


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """The batches of a run; `batch_plan` makes one from shards. `members`: the numbers of each bucket's pictures."""

    sizes: Sequence[Size]
    members: Sequence[Indices]
    batch_size: int
    seed: int
    orders: dict[int, dict[int, Indices]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """The pictures that an epoch goes over."""
        return sum(map(len, self.members))

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        if step < 0:
            raise InputError(f"step {step} is negative; steps count from 0")
        epoch = self.epoch(step)
        bucket, number = self._turns(epoch)[step - self.first_step(epoch)]
        places = number * self.batch_size + np.arange(self.batch_size)
        passes, rest = np.divmod(places, len(self.members[bucket]))
        indices = np.empty(self.batch_size, np.int64)
        for which in np.unique(passes):
            chosen = passes == which
            indices[chosen] = self.members[bucket][self._order(bucket, int(which))[rest[chosen]]]
        return Batch(self.sizes[bucket], indices)

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with: all full batches of the epochs before."""
        return sum(epoch * len(members) // self.batch_size for members in self.members)

    def epoch(self, step: int) -> int:
        """The epoch that a step is in."""
        low = step * self.batch_size // len(self)  # what carries over can only delay an epoch's end
        high = low + len(self.members) * self.batch_size // len(self) + 2
        return low - 1 + bisect_right(range(low, high), step, key=self.first_step)

    def _turns(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, which of its batches) of each step of an epoch."""
        return _turns(tuple(map(len, self.members)), self.batch_size, self.seed, epoch)

    def _order(self, bucket: int, which: int) -> Indices:
        """The order of a bucket's pictures in one of its passes; the last two are kept, since sorting takes time."""
        orders = self.orders.setdefault(bucket, {})
        if which not in orders:
            if len(orders) > 1:
                del orders[min(orders)]
            orders[which] = _shuffled(len(self.members[bucket]), self.seed, bucket, which)
        return orders[which]


def batch_plan(shards: Shards, *, batch_size: int, seed: int, rule: Filter | None = None) -> BatchPlan:
    """The batches of the pictures in `shards`, or of those that `rule` keeps; `batch_size` counts over all ranks."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; a batch needs at least 1 picture")
    chosen = np.arange(len(shards)) if rule is None else shards.select(rule)
    if not len(chosen):
        raise InputError(f"{shards.folder} holds no picture to train on; prepare it again, or loosen the filter")
    buckets = shards.buckets[chosen]
    used = np.unique(buckets).tolist()
    return BatchPlan(
        sizes=[shards.manifest.sizes[bucket] for bucket in used],
        members=[chosen[buckets == bucket] for bucket in used],
        batch_size=batch_size,
        seed=seed,
    )


@lru_cache(maxsize=4)
def _turns(counts: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    turns = [
        (bucket, number)
        for bucket, count in enumerate(counts)
        for number in range(epoch * count // batch_size, (epoch + 1) * count // batch_size)
    ]
    return [turns[i] for i in _shuffled(len(turns), seed, -1, epoch)]


def _shuffled(count: int, seed: int, *what: int) -> Indices:
    """A permutation of 0..count - 1, sorted by numbers as random as SplitMix64's: the same with any numpy."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in (seed, *what):
            state = _mixed(np.array([state + np.uint64(part % 2**64)]))[0]
        keys = _mixed(state + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(keys, kind="stable")


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014, fig. 16), after one step of its state."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
