"""Data-parallel training over processes: each has a part of the batch, gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def join_ranks() -> tuple[int, int]:
    """(rank, number of ranks), from the environment that `torchrun` sets; (0, 1) without it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return (dist.get_rank(), ranks) if ranks > 1 else (0, 1)


def leave_ranks() -> None:
    """Wait for all ranks and part: a rank whose peer has gone without a word aborts."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def average(gradients: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
    """Average `gradients` in place over all ranks; `numbers` averaged too, so that ranks decide alike by them."""
    if not dist.is_initialized():
        return list(numbers)
    extra = torch.tensor(numbers, dtype=torch.float32)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), extra])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, extra = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    averaged: list[float] = extra.tolist()
    return averaged
