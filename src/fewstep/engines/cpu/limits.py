"""How many cores and how much memory this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fewstep.errors import InputError
from fewstep.memory import cgroup_numbers, is_short_of_memory, shortage

THREADS = torch.get_num_threads()
"""What PyTorch takes by itself."""

SMALL = 50_000_000
"""Parameters of a UNet below which one thread is enough."""


def usable_cores() -> int:
    """The cores that the scheduler gives to this process, or the time of as many: a container may have fewer."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (
        cgroup_numbers("cpu.max") or cgroup_numbers("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us") or (0, 1)
    )
    return max(1, min(affinity, round(quota / period))) if quota > 0 else affinity


def threads_for(parameters: int) -> int:
    """How many threads run a network of so many parameters best.

    A number that the user has chosen, by OMP_NUM_THREADS or torch.set_num_threads; else one for small networks, which
    gain next to nothing by more, while on a busy machine threads wait for each other at every layer; else no more than
    there are cores.
    """
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != THREADS:
        return torch.get_num_threads()
    return 1 if parameters < SMALL else min(THREADS, usable_cores())


@contextmanager
def cap_threads(count: int) -> Iterator[None]:
    """Run the block with `count` threads, in this thread of Python alone; its own number comes back at the end."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's report of a lack of memory into an InputError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_short_of_memory(error):
            raise
        raise InputError(
            f"{shortage(error)}; draw fewer or smaller pictures, or load the model with decoder='tiny'"
        ) from error
