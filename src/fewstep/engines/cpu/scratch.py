"""Memory that is used again and again: fresh pages have to be cleared, and a virtual machine gets them from its host.

On one such machine 134 MB of fresh pages cost between 8 and 160 ms to write, and 4 ms the next time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 16 << 20
"""Bytes above which the system's allocator hands out fresh pages each time."""

_local = threading.local()


def scratch(name: str, shape: Sequence[int]) -> Tensor:
    """An uninitialised float32 tensor on memory that each thread keeps from call to call, in inference mode or not."""
    pool: dict[str, Tensor] = _local.__dict__.setdefault("pool", {})
    size = torch.Size(shape).numel()
    if name not in pool or pool[name].numel() < size:
        pool.pop(name, None)
        with torch.inference_mode(False):
            pool[name] = torch.empty(size)
    return pool[name][:size].view(tuple(shape))


class Outputs:
    """Hands out large tensors on memory that no other tensor uses any more."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor; what it lies on is free again when it and all its views are gone."""
        size = torch.Size(shape).numel()
        if 4 * size < LARGE:
            return torch.empty(shape)
        with self._lock:
            free = [each for each in self._kept if _users(each) == 1]
            fits = [each for each in free if each.numel() >= size]
            if not fits:
                self._kept = [each for each in self._kept if not any(each is one for one in free)]  # all too small
                with torch.inference_mode(False):
                    fits = [torch.empty(size)]
                self._kept += fits
            return min(fits, key=lambda each: each.numel())[:size].view(shape)


def _users(tensor: Tensor) -> int:
    """Tensors that lie on the memory of `tensor`, itself among them."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1  # the storage's own name is one more
