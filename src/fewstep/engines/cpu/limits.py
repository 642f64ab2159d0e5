"""How many cores and how much memory this process may use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fewstep.errors import InputError

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that the scheduler gives to this process, or the time of as many: a container may have fewer."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _numbers("cpu.max") or _numbers("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us") or (0, 1)
    return max(1, min(affinity, round(quota / period))) if quota > 0 else affinity


def spare_threads() -> None:
    """Take no more threads than there are cores to run them; a number that the user has chosen stays."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def free_bytes() -> int | None:
    """Memory that can still be had, where the system tells it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    limit, used = _numbers("memory.max"), _numbers("memory.current")
    return min(free, limit[0] - used[0]) if limit and used else free


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's report of a lack of memory into an InputError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        needed, free = re.search(r"(\d+) bytes", str(error)), free_bytes()
        raise InputError(
            f"{int(needed[1]) if needed else 0:,} more bytes of memory are needed at once and "
            f"{'an unknown number' if free is None else f'{free:,}'} are free; draw fewer or smaller pictures, "
            "or load the model with decoder='tiny'"
        ) from error


def _numbers(*files: str) -> tuple[int, ...] | None:
    """The numbers in files of the process's control group; None where there are none, or no limit."""
    try:
        words = " ".join((_CGROUP / file).read_text(encoding="ascii") for file in files).split()
        return tuple(int(word) for word in words)
    except (OSError, ValueError):
        return None
