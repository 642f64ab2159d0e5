"""A training run as data: stages, each a task and a plan; and how they are carried out."""

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
from fewstep.train.trainer import Objective, Trainer


def _nothing(trainer: Trainer) -> None:
    del trainer


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """A task made ready: what is trained, and what comes of it.

    `begin` makes the data that the losses read; a dry run leaves it out, and with it the first step. `finish` writes
    what the stage is for, from the averaged weights; it is called on all ranks, and writes on rank 0. `sample` draws a
    sheet of the same pictures each time it is called. `waited` tells how long there was no data.
    """

    objectives: Mapping[str, Objective]
    begin: Callable[[], None] | None = None
    finish: Callable[[Trainer], None] = _nothing
    sample: Callable[[Trainer], Image.Image] | None = None
    waited_seconds: Callable[[], float] = lambda: 0.0


class Task(Protocol):
    """What is to be learned: a frozen dataclass of settings."""

    def prepare(self, plan: Plan) -> StageSetup:
        """Load models and open data; raise what is wrong with them. Nothing is written here."""


@dataclass(frozen=True, kw_only=True)
class RecipeStage:
    """One stage of a recipe."""

    task: Task
    plan: Plan

    @property
    def name(self) -> str:
        """The stage's, and its folder's."""
        return self.plan.folder.name


def chosen(runs: Mapping[str, RecipeStage], names: Sequence[str]) -> dict[str, RecipeStage]:
    """The named stages in the recipe's order, or all."""
    for name in names:
        if name not in runs:
            raise InputError(unknown("stage", name, tuple(runs)))
    return {name: run for name, run in runs.items() if not names or name in names}


BeforeTraining = Callable[[RecipeStage, Trainer], None]
"""What is called when all is ready, with the run where it goes on."""


def run_stage(run: RecipeStage, *, before: BeforeTraining = lambda run, trainer: None) -> Trainer | None:
    """Train a stage to its end and write what comes of it; None where that was done before, with the same settings.

    Where it was done, but for fewer steps or seconds than the plan has now, training goes on from its end. Raises
    `InputError` where it was done with other settings, or for longer.
    """
    if is_done(run.plan, settings(run)):
        return None
    setup = _prepared(run)
    if setup.begin is not None:
        setup.begin()
    trainer = _trainer(setup, run.plan)
    before(run, trainer)
    trainer.run()
    if not trainer.stopping:
        setup.finish(trainer)
        if trainer.rank == 0:
            write_done(run.plan, settings(run), steps=trainer.step, seconds=trainer.clock)
    barrier()  # the next stage may begin from what rank 0 has just written
    return trainer


def dry_run(run: RecipeStage, *, before: BeforeTraining = lambda run, trainer: None) -> tuple[Trainer | None, bool]:
    """All that `run_stage` does and checks before the first step, with nothing written.

    The trainer, None where the stage was done before; and whether the data are there, so that a step can be tried.
    """
    if is_done(run.plan, settings(run)):
        return None, True
    setup = _prepared(run)
    trainer = _trainer(setup, run.plan)
    if setup.begin is None:
        before(run, trainer)
    return trainer, setup.begin is None


def unfinished_dependency(run: RecipeStage, earlier: Sequence[RecipeStage]) -> RecipeStage | None:
    """The first of the `earlier` stages that a setting of `run` names the folder of and that is not done, or None."""
    for other in earlier:
        folder = other.plan.folder
        named = (Path(value) for name, value in settings(run).items() if name != "plan.folder")
        if any(path.is_relative_to(folder) for path in named) and not is_done(other.plan, settings(other)):
            return other
    return None


def _prepared(run: RecipeStage) -> StageSetup:
    setup: object = run.task.prepare(run.plan)
    if not isinstance(setup, StageSetup):
        raise InputError(f"{type(run.task).__name__}.prepare returned {quoted(setup)}; it must return a Work")
    return setup


def _trainer(setup: StageSetup, plan: Plan) -> Trainer:
    trainer = Trainer(setup.objectives, plan, waited_seconds=setup.waited_seconds, sample=setup.sample)
    if plan.steps is not None and trainer.step > plan.steps:
        raise InputError(
            f"{plan.folder} holds a run that is at step {trainer.step} already, past plan.steps = {plan.steps}; "
            f"ask for at least {trainer.step}, or give another folder with --out"
        )
    return trainer
