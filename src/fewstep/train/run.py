"""A training run as data: stages, each a task and a plan; and how they are carried out."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from PIL import Image

from fewstep.errors import InputError, unknown
from fewstep.train.plan import Plan
from fewstep.train.ranks import meet_ranks
from fewstep.train.trainer import Trainer, Turn

DONE = "done"
"""The file that a finished stage leaves in its folder."""


def _nothing(trainer: Trainer) -> None:
    del trainer


@dataclass(frozen=True, kw_only=True)
class Work:
    """A task made ready: what is trained, and what comes of it.

    `finish` writes what the stage is for, from the averaged weights; it is called on all ranks, and writes on rank 0.
    `sample` draws a sheet of the same pictures each time it is called. `waited` tells how long there was no data.
    """

    turns: Mapping[str, Turn]
    finish: Callable[[Trainer], None] = _nothing
    sample: Callable[[Trainer], Image.Image] | None = None
    waited: Callable[[], float] = lambda: 0.0


class Task(Protocol):
    """What is to be learned: a frozen dataclass of settings."""

    def prepare(self, plan: Plan) -> Work:
        """Load models and data."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stage of a recipe."""

    task: Task
    plan: Plan

    @property
    def name(self) -> str:
        """The stage's, and its folder's."""
        return self.plan.folder.name


def recipe_stages(recipe: Path, out: Path) -> dict[str, Run]:
    """The stages of a recipe by name: what its `stages(out)` returns; they keep what they make below `out`."""
    if not recipe.is_file():
        raise InputError(f"there is no recipe {recipe}; give the path of a Python file such as recipes/sd_v1_4.py")
    module = _imported(recipe)
    if not hasattr(module, "stages"):
        raise InputError(f"{recipe} has no function stages(out: Path) -> Sequence[Run], so it is not a recipe")
    runs: Sequence[Run] = module.stages(out)
    return {run.name: run for run in runs}


def chosen(runs: Mapping[str, Run], names: Sequence[str]) -> dict[str, Run]:
    """The named stages in the recipe's order, or all."""
    for name in names:
        if name not in runs:
            raise InputError(unknown("stage", name, tuple(runs)))
    return {name: run for name, run in runs.items() if not names or name in names}


def carry_out(run: Run, *, before: Callable[[Run, Trainer], None] = lambda run, trainer: None) -> Trainer | None:
    """Train a stage to its end and write what comes of it; None where that was done before.

    `before` is called when all is ready, with the run where it goes on.
    """
    done = run.plan.folder / DONE
    if done.exists():
        return None
    work = run.task.prepare(run.plan)
    trainer = Trainer(work.turns, run.plan, waited=work.waited, sample=work.sample)
    before(run, trainer)
    trainer.run()
    if not trainer.stopping:
        work.finish(trainer)
        done.touch()
    meet_ranks()  # the next stage may begin from what rank 0 has just written
    return trainer


def _imported(path: Path) -> ModuleType:
    """The module at `path`; its neighbours can be imported from it."""
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
