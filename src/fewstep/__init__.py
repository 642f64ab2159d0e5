"""fewstep: latent diffusion, from training to one-step pictures on any device.

    import fewstep
    pipe = fewstep.load()
    pipe.text_to_image("a red cube on top of a blue sphere", seed=7).images[0].save("cube.png")

Everything is imported when it is first used, so that `import fewstep` costs next to nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep.version import __version__

# PyTorch reads it once, when it is imported: large tensors on huge pages, whose first use costs a fraction
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from fewstep.adapters.merge import add_lora, remove_lora
    from fewstep.diffusion.samplers import SAMPLERS
    from fewstep.diffusion.schedule import SCHEDULES
    from fewstep.errors import CheckpointError, InputError, MissingExtraError, NotFiniteError
    from fewstep.models.zoo import CATALOGUE
    from fewstep.pipeline.load import load
    from fewstep.pipeline.pipeline import Pipeline
    from fewstep.pipeline.request import Progress, SizeConditioning
    from fewstep.pipeline.result import Result
    from fewstep.pipeline.run import Run

_HOMES = {
    "CATALOGUE": "fewstep.models.zoo",
    "CheckpointError": "fewstep.errors",
    "InputError": "fewstep.errors",
    "MissingExtraError": "fewstep.errors",
    "NotFiniteError": "fewstep.errors",
    "Pipeline": "fewstep.pipeline.pipeline",
    "Progress": "fewstep.pipeline.request",
    "Result": "fewstep.pipeline.result",
    "Run": "fewstep.pipeline.run",
    "SAMPLERS": "fewstep.diffusion.samplers",
    "SCHEDULES": "fewstep.diffusion.schedule",
    "SizeConditioning": "fewstep.pipeline.request",
    "add_lora": "fewstep.adapters.merge",
    "load": "fewstep.pipeline.load",
    "remove_lora": "fewstep.adapters.merge",
}

__all__ = [
    "CATALOGUE",
    "SAMPLERS",
    "SCHEDULES",
    "CheckpointError",
    "InputError",
    "MissingExtraError",
    "NotFiniteError",
    "Pipeline",
    "Progress",
    "Result",
    "Run",
    "SizeConditioning",
    "__version__",
    "add_lora",
    "load",
    "remove_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
