"""Settings that have new names: an old one is refused with the new name, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

from fewstep.errors import InputError

T = TypeVar("T")

RENAMED: dict[str, dict[str, str]] = {
    "Plan": {
        "rate": "learning_rate",
        "accumulate": "gradient_accumulation",
        "clip": "max_grad_norm",
        "floor": "min_lr_ratio",
        "decay": "lr_decay_fraction",
        "ema": "ema_decay",
        "sharing": "parallelism",
        "compiled": "compile",
        "batch": "batch_size",
        "warmup": "warmup_steps",
        "checkpointing": "activation_checkpointing",
        "replayed": "cuda_graphs",
        "keep": "keep_checkpoints",
    },
    "DiffusionTask": {"text_drop": "caption_dropout", "gamma": "snr_gamma", "floor": "snr_floor"},
    "AutoencoderTask": {"kl": "kl_weight"},
    "PrunedStudentTask": {
        "text_drop": "caption_dropout",
        "own": "denoising_weight",
        "output": "output_weight",
        "features": "feature_weight",
    },
    "TurboTask": {"discriminator_rate": "discriminator_lr_multiplier"},
    "AddSettings": {
        "shares": "timestep_probs",
        "distill": "distillation_weight",
        "adversarial": "adversarial_weight",
        "r1": "r1_weight",
        "guidance": "guidance_scale",
        "levels": "teacher_timesteps",
        "judged": "discriminator_timesteps",
        "mismatched": "mismatched_caption_weight",
        "anchor": "regression_weight",
        "walked": "from_trajectories",
    },
    "RegressionTask": {"walks": "trajectories"},
    "TrajectorySettings": {"batch": "batch_size", "guidance": "guidance_scale", "kept": "stored_timesteps"},
}
"""Old name -> new name of each settings class's fields."""


def refuse_renamed(kind: type, names: Iterable[str], path: str = "") -> None:
    """Raise `InputError` for the first of `names` that is an old name of a field of `kind`; `path` precedes both."""
    for name in names:
        new = RENAMED.get(kind.__name__, {}).get(name)
        if new is not None:
            raise InputError(f"{path}{name} is called {path}{new}")


def refuses_renamed(kind: type[T]) -> type[T]:
    """Class decorator above `@dataclass`: keywords with old names raise `InputError` instead of `TypeError`."""
    init: Callable[..., None] = kind.__init__

    @wraps(init)
    def checked(self: T, *args: Any, **settings: Any) -> None:
        refuse_renamed(kind, settings, f"{kind.__name__}.")
        init(self, *args, **settings)

    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


def renamed_paths(config: object, path: str = "") -> dict[str, str]:
    """Old dotted name -> new dotted name of all settings in nested dataclasses, for reading stored settings."""
    assert is_dataclass(config)
    paths = {f"{path}{old}": f"{path}{new}" for old, new in RENAMED.get(type(config).__name__, {}).items()}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            paths |= renamed_paths(value, f"{path}{field.name}.")
    return paths
