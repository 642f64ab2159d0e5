"""The machine's name and peak speeds, and the FLOPs of a task."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.speed.tasks import STAGES, Piece, Task, inputs
from fewstep.evaluate.environment import processor


class Peaks(NamedTuple):
    """The best that PyTorch reaches here: products and convolutions in FLOP/s, copying in bytes/s."""

    product: float
    convolution: float
    copy: float

    def text(self) -> str:
        """One line for reports."""
        product, convolution, copy = (f"{value / 1e9:,.0f}" for value in self)
        return f"matrix product {product} GFLOP/s, 3x3 convolution {convolution} GFLOP/s, copy {copy} GB/s"


def peaks(task: Task) -> Peaks:
    """The peaks of the task's device, number format and threads: the best of a few runs each."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(task.threads)
    wait = torch.cuda.synchronize if task.device.startswith("cuda") else lambda: None
    large = 8192 if task.device.startswith("cuda") else 2048
    kind: dict[str, Any] = {"device": task.device, "dtype": getattr(torch, task.dtype)}
    a, b = torch.randn(large, large, **kind), torch.randn(large, large, **kind)
    x = torch.randn(1, 256, 128, 128, **kind).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, **kind).contiguous(memory_format=torch.channels_last)
    long = torch.randn(1 << 26, device=task.device)
    target = torch.empty_like(long)
    with torch.inference_mode():
        return Peaks(
            product=2 * large**3 / _best(lambda: a @ b, wait),
            convolution=2 * 9 * 256 * 256 * 128 * 128 / _best(lambda: F.conv2d(x, w, padding=1), wait),
            copy=2 * long.nbytes / _best(lambda: target.copy_(long), wait),
        )


def _best(run: Callable[[], object], wait: Callable[[], None], repeats: int = 8) -> float:
    seconds = []
    for _ in range(repeats):
        wait()
        started = perf_counter()
        run()
        wait()
        seconds.append(perf_counter() - started)
    return min(seconds)


def flops(task: Task) -> dict[str, float]:
    """FLOPs of each stage, counted on meta tensors."""
    counted = {piece.kind: _counted(task, piece) for piece in task.pieces}
    if task.part == "whole":
        counted["unet"] *= len(task.levels.times)
        assert tuple(counted) == STAGES
    return counted


def _counted(task: Task, piece: Piece) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    given = [torch.from_numpy(value).to("meta") for value in inputs(task, piece)]
    with torch.device("meta"):
        networks = _networks(task, piece.kind)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for network in networks:
            network(*given)
    return float(counter.get_total_flops())


def _networks(task: Task, kind: str) -> list[Any]:
    """fewstep's own plain networks of this shape as functions: of text there may be two."""
    from fewstep.models.autoencoder import AutoencoderKL
    from fewstep.models.text_encoder import TextEncoder
    from fewstep.models.tiny_autoencoder import TinyAutoencoder
    from fewstep.models.unet import UNet
    from fewstep.models.zoo import entry

    known = entry(task.model)
    assert known.unet is not None
    assert known.autoencoder is not None
    if kind == "text":
        return [TextEncoder(config) for config in known.texts]
    if kind == "unet":
        return [UNet(known.unet)]
    if kind == "decode" and task.decoder is not None:
        return [TinyAutoencoder().decode]
    return [getattr(AutoencoderKL(known.autoencoder), kind)]


def threads_here() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware_name(device: str, threads: int) -> str:
    """A short name for files: `nvidia-h100`, `amd-epyc-9b45-2core`."""
    if device.startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()} {threads}core"
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*?hz|\d+-core", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", words))
