"""Checks before a run begins: parameter counts, memory and disk space, and an estimate of hours and emissions."""

from __future__ import annotations

import math
import os
import shutil
import time

import torch

from fewstep.errors import InputError
from fewstep.train.stages import RecipeStage
from fewstep.train.trainer import Trainer

BYTES_PER_TRAINED = 4 * 5
"""Weight, gradient, two moments of AdamW and the moving average, in float32."""
CHECKPOINT_BYTES = 4 * 4
"""Weight, average and two moments, on the disk."""
WATTS = {"cpu": 100.0, "cuda": 250.0}
KG_PER_KWH = 0.3
"""Assumed: a desktop's processor whole, a graphics card as those that trained Stable Diffusion v1, a usual grid."""


def parameter_counts(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """(all, trained) parameters of each network."""
    return {
        name: (sum(p.numel() for p in state.network.parameters()), sum(p.numel() for p in state.parameters))
        for name, state in trainer.states.items()
    }


def check_fits(stage: RecipeStage, trainer: Trainer) -> None:
    """Raise `InputError` where weights, optimizer and average cannot be in memory, or a checkpoint not on the disk."""
    trained = sum(count for _, count in parameter_counts(trainer).values())
    needed, free = trained * BYTES_PER_TRAINED, _free_memory(_kind(trainer))
    if free is not None and needed > free:
        raise InputError(
            f"stage {stage.name} needs {needed / 1e9:.1f} GB for weights, gradients and optimizer alone; "
            f"{free / 1e9:.1f} GB are free. Train fewer parameters (LoRA), shard them over more "
            "ranks, or take a larger machine"
        )
    existing = next(folder for folder in (stage.plan.folder, *stage.plan.folder.absolute().parents) if folder.is_dir())
    space, checkpoint_bytes = (
        shutil.disk_usage(existing).free,
        trained * CHECKPOINT_BYTES * (stage.plan.keep_checkpoints + 1),
    )
    if checkpoint_bytes > space:
        raise InputError(
            f"stage {stage.name} keeps {checkpoint_bytes / 1e9:.1f} GB of checkpoints; "
            f"{space / 1e9:.1f} GB are free in {stage.plan.folder}"
        )


def estimate(stage: RecipeStage, trainer: Trainer) -> str:
    """One line: how long the rest will take here, and what that emits; steps are timed by a second one, not applied."""
    plan, seconds = stage.plan, 0.0
    for _ in range(2):
        started = time.monotonic()
        trainer.dry_step()
        seconds = time.monotonic() - started
    hours = min(
        math.inf if plan.steps is None else (plan.steps - trainer.step) * seconds / 3600,
        math.inf if plan.seconds is None else max(0.0, plan.seconds - trainer.clock) / 3600,
    )
    watts = assumed_watts(trainer)
    kg = hours * watts / 1000 * KG_PER_KWH
    return f"about {hours:.3g} h to go, {kg:.3g} kg CO2 at {watts:g} W and {KG_PER_KWH:g} kg/kWh (assumed)"


def assumed_watts(trainer: Trainer) -> float:
    """Of all the hardware: a card for each process, or one processor for all."""
    kind = _kind(trainer)
    return WATTS.get(kind, WATTS["cuda"]) * (1 if kind == "cpu" else trainer.ranks)


def _kind(trainer: Trainer) -> str:
    """Of the device that the networks are on."""
    return next(iter(trainer.states.values())).device.type


def _free_memory(kind: str) -> int | None:
    """Bytes that are free where training happens; None where nothing says so."""
    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
