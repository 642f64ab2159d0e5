"""How many cores and how much memory this process may use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import torch

from fewstep.errors import InputError
from fewstep.memory import cgroup_numbers, is_short_of_memory, shortage

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
    threads = torch.get_num_threads()
    if _is_chosen(threads):
        return threads
    return 1 if parameters < SMALL else min(threads, usable_cores())


@contextmanager
def cap_threads(count: int) -> Iterator[None]:
    """Run the block with `count` threads, in this thread of Python alone; its own number comes back at the end."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    mkl = _set_threads(count, count)
    try:
        yield
    finally:
        _set_threads(before, mkl)


def engine_threads(engine: object) -> AbstractContextManager[None]:
    """`cap_threads` with as many as `engine` takes, for what is done beside its calls; all where it names none."""
    return cap_threads(getattr(engine, "threads", None) or torch.get_num_threads())


def _set_threads(count: int, mkl: int) -> int:
    """Set OpenMP's and MKL's numbers for this thread; MKL's own until now, 0 where it had none.

    `torch.set_num_threads` would also set what threads that are new to PyTorch begin with.
    """
    before = 0
    if _openmp is not None:
        _openmp.omp_set_num_threads(count)
        if _has_mkl:
            before = _openmp.MKL_Set_Num_Threads_Local(mkl)
    if torch.get_num_threads() != count:  # a build with threads of another kind
        torch.set_num_threads(count)
    return before


def _is_chosen(threads: int) -> bool:
    """Whether the user has chosen this thread's number: MKL has one of its own after `torch.set_num_threads`."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")) or threads != DEFAULT:
        return True
    if _openmp is None or not _has_mkl:
        return False
    chosen = _openmp.MKL_Set_Num_Threads_Local(0)
    _openmp.MKL_Set_Num_Threads_Local(chosen)
    return bool(chosen != 0)


def _openmp_of_torch() -> ctypes.CDLL | None:
    """PyTorch's own OpenMP (and MKL, where it has that), found among the libraries that it has loaded."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        library.omp_set_num_threads.argtypes = [ctypes.c_int]
        library.omp_get_max_threads.argtypes = []
    except (OSError, AttributeError, TypeError):  # Windows, or a build without OpenMP
        return None
    return library


def _default_threads() -> int:
    """What PyTorch takes by itself: asked in a new thread, which knows nothing of `torch.set_num_threads`."""
    if _openmp is None:
        return torch.get_num_threads()
    ask = _openmp.MKL_Get_Max_Threads if _has_mkl else _openmp.omp_get_max_threads
    with ThreadPoolExecutor(1) as new:
        return int(new.submit(ask).result())


_openmp = _openmp_of_torch()
_has_mkl = hasattr(_openmp, "MKL_Set_Num_Threads_Local") and hasattr(_openmp, "MKL_Get_Max_Threads")
DEFAULT = _default_threads()
"""Threads that PyTorch takes by itself."""


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
