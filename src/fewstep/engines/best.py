"""The engine that runs a model best where it is."""

from __future__ import annotations

from fewstep.engines.cpu.engine import CpuEngine, runs
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Engine
from fewstep.engines.rebuilt import is_known
from fewstep.weights.parts import Parts


def best_engine(parts: Parts) -> Engine:
    """The one for CPUs where the model is on a CPU and has no layers of other kinds, the plain one elsewhere."""
    known = all(is_known(network) for network in (parts.unet, parts.autoencoder, *parts.text_encoders))
    return CpuEngine(parts) if known and runs(parts) else EagerEngine(parts)
