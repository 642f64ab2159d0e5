"""Data-parallel training: initialising and ending the process group, sharding weights (FSDP2), averaging gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def init_ranks() -> tuple[int, int]:
    """(rank, number of ranks), from the environment that `torchrun` sets; (0, 1) without it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), ranks) if ranks > 1 else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def shutdown_ranks() -> None:
    """Wait for all ranks and destroy the process group: a rank whose peer has ended without that aborts."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(network: nn.Module) -> None:
    """Share the weights of `network` out over all ranks, block by block (FSDP2); nothing with a single rank.

    Each module in a list is a block, inner ones first; a list or a dict of networks is none itself.
    """
    if not dist.is_initialized():
        return
    for module in reversed(list(network.modules())):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            for block in module.children():
                if not isinstance(block, (FSDPModule, nn.ModuleList)):
                    fully_shard(block)
    if not isinstance(network, (nn.ModuleList, nn.ModuleDict)):
        fully_shard(network)


def average(gradients: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
    """Average `gradients` in place over all ranks; `numbers` averaged too, so that ranks decide alike by them."""
    if not dist.is_initialized():
        return list(numbers)
    device = gradients[0].device if gradients else torch.device("cpu")
    extra = torch.tensor(numbers, dtype=torch.float32, device=device)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), extra])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, extra = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    averaged: list[float] = extra.tolist()
    return averaged
