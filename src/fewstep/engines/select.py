"""Selects the fastest engine for a model on its device."""

from __future__ import annotations

from fewstep.engines.cpu.engine import CpuEngine
from fewstep.engines.cpu.engine import supports as cpu_supports
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Engine
from fewstep.engines.replace_layers import is_known
from fewstep.weights.parts import Parts


def select_engine(parts: Parts) -> Engine:
    """The one for CPUs or NVIDIA cards where the model is on one; the plain one elsewhere, and for layers of other
    kinds, which those two do not know.
    """
    if not all(is_known(network) for network in (parts.unet, parts.autoencoder, *parts.text_encoders)):
        return EagerEngine(parts)
    if cpu_supports(parts):
        return CpuEngine(parts)
    if parts.unet.conv_in.weight.is_cuda:
        from fewstep.engines.cuda.card import supports
        from fewstep.engines.cuda.engine import CudaEngine

        return CudaEngine(parts) if supports(parts) else EagerEngine(parts)
    return EagerEngine(parts)
