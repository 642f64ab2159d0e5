"""A training run as data: stages, each a task and a plan; and how a stage is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from fewstep.errors import InputError, quoted, unknown
from fewstep.train.distributed import barrier
from fewstep.train.done import is_done, write_done
from fewstep.train.overrides import settings
from fewstep.train.plan import Plan
from fewstep.train.renamed import renamed_paths
from fewstep.train.trainer import Objective, Trainer


def _nothing(trainer: Trainer) -> None:
    del trainer


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """What a task's `prepare` returns: the objectives of a stage, and the callbacks around its training.

    `begin` generates the data that the losses read; a dry run skips it, and with it the first step. `finish` writes
    the stage's result from the averaged weights; it is called on all ranks, and writes on rank 0. `sample` generates a
    sheet of the same pictures each time it is called. `waited_seconds`: seconds spent waiting for data so far.
    """

    objectives: Mapping[str, Objective]
    begin: Callable[[], None] | None = None
    finish: Callable[[Trainer], None] = _nothing
    sample: Callable[[Trainer], Image.Image] | None = None
    waited_seconds: Callable[[], float] = lambda: 0.0


class TrainingTask(Protocol):
    """What is trained on which data: a frozen dataclass of settings."""

    def prepare(self, plan: Plan) -> StageSetup:
        """Load models and open data; raise what is wrong with them. Nothing is written here."""


@dataclass(frozen=True, kw_only=True)
class RecipeStage:
    """One stage of a recipe: what is trained, and how."""

    task: TrainingTask
    plan: Plan

    @property
    def name(self) -> str:
        """The stage's name, which is that of its folder."""
        return self.plan.folder.name

    @property
    def done(self) -> bool:
        """Whether it was trained to its end before; raises `InputError` where that was with other settings."""
        return is_done(self.plan, settings(self), renamed_paths(self))


def selected(stages: Mapping[str, RecipeStage], names: Sequence[str]) -> dict[str, RecipeStage]:
    """The named stages in the recipe's order, or all without names. Raises `InputError` for an unknown name."""
    for name in names:
        if name not in stages:
            raise InputError(unknown("stage", name, tuple(stages)))
    return {name: stage for name, stage in stages.items() if not names or name in names}


BeforeTraining = Callable[[RecipeStage, Trainer], None]
"""Called with the stage and its trainer, checkpoint restored, before the first step."""


def run_stage(stage: RecipeStage, *, before: BeforeTraining = lambda stage, trainer: None) -> Trainer | None:
    """Train a stage to its end and write its result; None where that was done before, with the same settings.

    Where it was done, but for fewer steps or seconds than the plan has now, training goes on from its end. Raises
    `InputError` where it was done with other settings, or for longer.
    """
    if stage.done:
        return None
    setup = _prepared(stage)
    if setup.begin is not None:
        setup.begin()
    trainer = _trainer(setup, stage.plan)
    before(stage, trainer)
    trainer.run()
    if not trainer.stopping:
        setup.finish(trainer)
        if trainer.rank == 0:
            write_done(stage.plan, settings(stage), steps=trainer.step, seconds=trainer.clock)
    barrier()  # the next stage may begin from what rank 0 has just written
    return trainer


def dry_run(stage: RecipeStage, *, before: BeforeTraining = lambda stage, trainer: None) -> tuple[Trainer | None, bool]:
    """All that `run_stage` does and checks before the first step, with nothing written.

    The trainer, None where the stage was done before; and whether the data are there, so that a step can be tried.
    """
    if stage.done:
        return None, True
    setup = _prepared(stage)
    trainer = _trainer(setup, stage.plan)
    if setup.begin is None:
        before(stage, trainer)
    return trainer, setup.begin is None


def unfinished_dependency(stage: RecipeStage, earlier: Sequence[RecipeStage]) -> RecipeStage | None:
    """The first of the `earlier` stages that is not done and whose folder a setting of `stage` names, or None."""
    for other in earlier:
        folder = other.plan.folder
        named = (Path(value) for name, value in settings(stage).items() if name != "plan.folder")
        if any(path.is_relative_to(folder) for path in named) and not other.done:
            return other
    return None


def _prepared(stage: RecipeStage) -> StageSetup:
    setup: object = stage.task.prepare(stage.plan)
    if not isinstance(setup, StageSetup):
        raise InputError(f"{type(stage.task).__name__}.prepare returned {quoted(setup)}; it must return a StageSetup")
    return setup


def _trainer(setup: StageSetup, plan: Plan) -> Trainer:
    trainer = Trainer(setup.objectives, plan, waited_seconds=setup.waited_seconds, sample=setup.sample)
    if plan.steps is not None and trainer.step > plan.steps:
        raise InputError(
            f"{plan.folder} holds a run that is at step {trainer.step} already, past plan.steps = {plan.steps}; "
            f"ask for at least {trainer.step}, or give another folder with --out"
        )
    return trainer
