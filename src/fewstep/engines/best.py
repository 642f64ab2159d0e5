"""The engine that runs a model best where it is."""

from __future__ import annotations

from fewstep.engines.cpu.engine import CpuEngine, runs
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Engine
from fewstep.weights.parts import Parts


def best_engine(parts: Parts) -> Engine:
    """The one for CPUs where the model is in float32 on a CPU, the plain one elsewhere."""
    return CpuEngine(parts) if runs(parts) else EagerEngine(parts)
