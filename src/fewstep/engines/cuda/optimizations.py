"""Optimizations of the engine for NVIDIA cards over the plain one, each of which can be turned off."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CudaOptimizations:
    """Which are used. None changes a picture by more than rounding; `benchmarks.speed` shows what each gives."""

    kernels: bool = True
    """Norms, gates and additions by one Triton kernel each, norms over groups by one or three, as measured."""
    upsampled: bool = True
    """A convolution after nearest-neighbour doubling as four of 2x2 on the small map, where that is faster."""
    attention: bool = True
    """The fastest of flash, cuDNN and memory-efficient attention for each shape."""
    graphs: bool = True
    """Each network as one CUDA graph for each shape."""
