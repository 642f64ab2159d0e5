"""Old names of settings: refused with the new one, and read from what earlier runs have stored."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.distill.add import AddSettings
from fewstep.distill.pruning import PrunedStudentTask
from fewstep.distill.trajectories import RegressionTask, TrajectorySettings
from fewstep.distill.turbo import TurboTask
from fewstep.errors import InputError
from fewstep.train.autoencoder import AutoencoderTask
from fewstep.train.datasets import Blockworld
from fewstep.train.diffusion import DiffusionTask
from fewstep.train.done import DONE, write_done
from fewstep.train.overrides import overridden, settings
from fewstep.train.plan import Plan
from fewstep.train.renamed import RENAMED
from fewstep.train.stages import RecipeStage

CLASSES: tuple[Any, ...] = (
    Plan,
    DiffusionTask,
    AutoencoderTask,
    PrunedStudentTask,
    TurboTask,
    AddSettings,
    RegressionTask,
    TrajectorySettings,
)
OLD = [(kind, old, new) for kind in CLASSES for old, new in RENAMED[kind.__name__].items()]


def test_every_new_name_is_a_field_and_no_old_one_is() -> None:
    assert {kind.__name__ for kind in CLASSES} == RENAMED.keys()
    for kind in CLASSES:
        names, table = {field.name for field in fields(kind)}, RENAMED[kind.__name__]
        assert set(table.values()) <= names
        assert not table.keys() & names


@pytest.mark.parametrize(("kind", "old", "new"), OLD)
def test_an_old_keyword_is_refused_with_the_new_one(kind: Any, old: str, new: str) -> None:
    with pytest.raises(InputError, match=rf"{kind.__name__}\.{old} is called {kind.__name__}\.{new}"):
        kind(**{old: 1})


def turbo_stage(folder: Path) -> RecipeStage:
    task = TurboTask(model="blocks-base", data=Blockworld())
    return RecipeStage(task=task, plan=Plan(folder=folder / "turbo", steps=10, learning_rate=2e-3))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.rate=1e-3", r"plan\.rate is called plan\.learning_rate"),
        ("turbo.plan.ema=0.9", r"plan\.ema is called plan\.ema_decay"),
        ("task.settings.shares=1", r"task\.settings\.shares is called task\.settings\.timestep_probs"),
        ("task.discriminator_rate=2", r"task\.discriminator_rate is called task\.discriminator_lr_multiplier"),
    ],
)
def test_an_old_name_on_the_command_line_is_refused_with_the_new_one(
    tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        overridden({"turbo": turbo_stage(tmp_path)}, [setting])


def test_the_record_of_an_earlier_run_is_read_by_its_old_names(tmp_path: Path) -> None:
    stage = turbo_stage(tmp_path)
    stage.plan.folder.mkdir()
    write_done(stage.plan, settings(stage), steps=10, seconds=3.0)
    path = stage.plan.folder / DONE
    record = json.loads(path.read_bytes())
    old = {"plan.learning_rate": "plan.rate", "task.settings.timestep_probs": "task.settings.shares"}
    record["settings"] = {old.get(name, name): value for name, value in record["settings"].items()}
    path.write_text(json.dumps(record))
    assert stage.done
    with pytest.raises(InputError, match=r"plan\.learning_rate was '0\.002' and is '0\.001'"):
        _ = replace(stage, plan=replace(stage.plan, learning_rate=1e-3)).done
    task = replace(stage.task, settings=AddSettings(timestep_probs=(0.1, 0.2, 0.3, 0.4)))  # type: ignore[type-var]
    with pytest.raises(InputError, match=r"task\.settings\.timestep_probs was"):
        _ = replace(stage, task=task).done
