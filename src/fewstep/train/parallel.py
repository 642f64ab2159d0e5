"""Data-parallel training over processes: each has a part of the batch, gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def join_ranks() -> tuple[int, int]:
    """(rank, number of ranks), from the environment that `torchrun` sets; (0, 1) without it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return (dist.get_rank(), ranks) if ranks > 1 else (0, 1)


def average(gradients: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
    """Average `gradients` in place over all ranks; `numbers` averaged too, so that ranks decide alike by them."""
    if not dist.is_initialized():
        return list(numbers)
    extra = torch.tensor(numbers, dtype=torch.float32)
    flat = torch.cat([_flatten_dense_tensors(gradients), extra])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat[: -len(numbers)], gradients), strict=True):
        gradient.copy_(mean)
    averaged: list[float] = flat[-len(numbers) :].tolist()
    return averaged
