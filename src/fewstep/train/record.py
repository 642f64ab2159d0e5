"""The training record that a stage leaves beside the weights it trained: `training.json`, with all earlier stages."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from fewstep.cards.training_record import FILE, TrainingRecord, TrainingStage, read_training
from fewstep.files import atomic_write
from fewstep.train.overrides import settings
from fewstep.train.preflight import KG_PER_KWH, assumed_watts
from fewstep.train.stages import RecipeStage
from fewstep.train.trainer import Trainer


def write_record(stage: RecipeStage, trainer: Trainer) -> None:
    """Write `training.json` into the stage's model folder: its own stage after those of the model it started from.

    Nothing on other ranks than 0, or where the stage has left no model.
    """
    model = stage.plan.folder / "model"
    if trainer.rank or not model.is_dir():
        return
    record = TrainingRecord(
        name=stage.name,
        summary=f"Trained with fewstep by the recipe's stage {stage.name}.",
        example="",
        licence="unknown",
        data=(),
        stages=(*ancestors(stage), stage_record(stage, trainer)),
        limits=(),
        kg_per_kwh=KG_PER_KWH,
    )
    with atomic_write(model / FILE) as file:
        file.write(record.to_json().encode())


def stage_record(stage: RecipeStage, trainer: Trainer) -> TrainingStage:
    """What a finished stage did: steps, hours, assumed power, hardware and all its settings."""
    return TrainingStage(
        name=stage.name,
        steps=trainer.step,
        batch=stage.plan.batch_size,
        precision=stage.plan.precision,
        hours=trainer.clock / 3600,
        watts=assumed_watts(trainer),
        hardware=hardware(trainer),
        settings=settings(stage),
    )


def ancestors(stage: RecipeStage) -> tuple[TrainingStage, ...]:
    """The stages that the model a stage starts from went through, oldest first; none where it has no record."""
    start = Path(str(getattr(stage.task, "student", None) or getattr(stage.task, "model", "")))
    return read_training(start).stages if (start / FILE).is_file() else ()


def hardware(trainer: Trainer) -> str:
    """The processors that trained, such as `2 x NVIDIA H100` or `2 cores, x86_64`."""
    if not torch.cuda.is_available():
        return f"{os.cpu_count()} cores, {platform.machine()}"
    name = torch.cuda.get_device_name()
    return f"{trainer.ranks} x {name}" if trainer.ranks > 1 else name
