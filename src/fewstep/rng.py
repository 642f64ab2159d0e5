"""Noise that belongs to a picture: each one draws from its own seed, whatever batch or device it is in."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import InputError, quoted

LARGEST_SEED = 2**63 - 1
LARGEST_DRAWN_SEED = 2**32 - 1  # what other programs accept too


class SeededNoise:
    """A source of standard normal noise with one generator for each of `seeds`.

    Calling it gives a fresh (len(seeds), *shape) float32 tensor on the CPU. Row i depends on `seeds[i]` and
    on the number of calls alone, and equals what diffusers draws from a list of CPU generators.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next draw of every picture, (len(seeds), *shape)."""
        draws = [torch.randn((1, *self.shape), generator=generator) for generator in self.generators]
        return torch.cat(draws)


def _whole(value: object) -> int:
    try:
        number = -1 if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number <= LARGEST_SEED:
        raise InputError(f"seed {quoted(value)} is not an integer from 0 to 2**63 - 1")
    return number


def seeds_for(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One seed for each of `count` pictures.

    None draws them from the system's entropy, in 0..2**32 - 1; an int counts up from itself; a sequence must
    hold exactly `count`. Raises `InputError` for anything that is not an int in 0..2**63 - 1.
    """
    if seed is None:
        return tuple(secrets.randbelow(LARGEST_DRAWN_SEED + 1) for _ in range(count))
    given: Any = seed.tolist() if hasattr(seed, "tolist") else seed  # of numpy or torch: Python's own numbers
    alone = isinstance(given, str) or not isinstance(given, Sequence)
    seeds = [_whole(value) for value in ([given] if alone else given)]
    if alone:
        seed = seeds[0]
        if seed + count - 1 > LARGEST_SEED:
            raise InputError(f"seed {seed} leaves no room to count up for {count} pictures below 2**63")
        return tuple(range(seed, seed + count))
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} pictures; give one for each, or a single integer")
    return tuple(seeds)
