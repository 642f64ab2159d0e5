"""Selects the fastest engine that supports a model."""

from __future__ import annotations

from fewstep.engines.cpu.engine import CpuEngine
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Engine
from fewstep.models.networks import Networks
from fewstep.weights.model import ModelSpec


def select_engine(spec: ModelSpec, networks: Networks) -> Engine:
    """The engine for CPUs or NVIDIA cards where it supports the model, and the plain one elsewhere."""
    if CpuEngine.supports(spec, networks):
        return CpuEngine(spec, networks)
    if networks.device.type == "cuda":
        from fewstep.engines.cuda.engine import CudaEngine

        if CudaEngine.supports(spec, networks):
            return CudaEngine(spec, networks)
    return EagerEngine(spec, networks)
