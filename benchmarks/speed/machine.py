"""What the machine itself reaches, and how much arithmetic a task is."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.contenders import Task, _theirs


def peaks(threads: int) -> str:
    """Matrix product, convolution and copy, each at its best of a few runs."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x = torch.randn(1, 256, 128, 128).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    long, target = torch.randn(1 << 26), torch.empty(1 << 26)
    product = 2 * 2048**3 / _best(lambda: a @ b) / 1e9
    convolution = 2 * 9 * 256 * 256 * 128 * 128 / _best(lambda: F.conv2d(x, w, padding=1)) / 1e9
    copied = 2 * long.nbytes / _best(lambda: target.copy_(long)) / 1e9
    return f"matrix product {product:.0f} GFLOP/s, 3x3 convolution {convolution:.0f} GFLOP/s, copy {copied:.0f} GB/s"


def _best(run: Callable[[], Tensor]) -> float:
    run()
    found = []
    for _ in range(5):
        started = perf_counter()
        run()
        found.append(perf_counter() - started)
    return min(found)


@torch.no_grad()
def flops(task: Task) -> float:
    """Of one run by the definition of convolutions, products and attention, counted on tensors without values."""
    network, example = _theirs(task)
    moved: Any = network.to("meta")
    with FlopCounterMode(display=False) as counter:
        moved(*(value.to("meta") for value in example))
    return float(counter.get_total_flops())
