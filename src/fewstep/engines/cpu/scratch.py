"""Large memory: on huge pages whenever the system has them, and used again and again.

Fresh pages have to be cleared, and a virtual machine may have to get them from its host: on one, 134 MB cost between 8
and 160 ms to write for the first time, and 4 ms the next.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page."""

LARGE = 16 << 20
"""Bytes above which the system's allocator hands out fresh pages each time."""

_local = threading.local()


def fresh(size: int) -> Tensor:
    """`size` uninitialised numbers in float32, outside of inference mode."""
    with torch.inference_mode(False):
        if 4 * size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size)
        try:
            memory = mmap.mmap(-1, 4 * size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return torch.empty(size)
        start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE
        return torch.frombuffer(memory, dtype=torch.float32, count=size, offset=start)


def scratch(name: str, shape: Sequence[int]) -> Tensor:
    """An uninitialised float32 tensor on memory that each thread keeps from call to call, in inference mode or not."""
    pool: dict[str, Tensor] = _local.__dict__.setdefault("pool", {})
    size = torch.Size(shape).numel()
    if name not in pool or pool[name].numel() < size:
        pool.pop(name, None)
        pool[name] = fresh(size)
    return pool[name][:size].view(tuple(shape))


class BufferPool:
    """Allocates large tensors, reusing memory whose earlier tensors are gone."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor; what it lies on is free again when it and all its views are gone."""
        size = torch.Size(shape).numel()
        if 4 * size < LARGE:
            return torch.empty(shape)
        with self._lock:
            free = [each for each in self._buffers if _users(each) == 1]
            fits = [each for each in free if each.numel() >= size]
            if not fits:
                self._buffers = [
                    each for each in self._buffers if not any(each is one for one in free)
                ]  # all too small
                fits = [fresh(size)]
                self._buffers += fits
            return min(fits, key=lambda each: each.numel())[:size].view(shape)


def _users(tensor: Tensor) -> int:
    """Tensors that lie on the memory of `tensor`, itself among them."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1  # the storage's own name is one more
