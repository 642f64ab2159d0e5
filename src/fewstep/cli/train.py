"""`fewstep train RECIPE [key=value ...]`: a recipe's stages, one after another, each going on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.exits import Exit, code_for

if TYPE_CHECKING:
    from fewstep.train.stages import RecipeStage
    from fewstep.train.trainer import Trainer


def train(
    recipe: Annotated[Path, typer.Argument(help="A Python file with a function stages(out).")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value for all stages, STAGE.key=value for one: plan.learning_rate=1e-5."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where it is kept; else runs/RECIPE.")] = None,
    stage: Annotated[list[str] | None, typer.Option("--stage", help="Only this stage; repeatable.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be checked before the first step, and write nothing.")
    ] = False,
    print_settings: Annotated[bool, typer.Option("--print-settings", help="Print the settings, and stop.")] = False,
) -> None:
    """Train what a recipe says, stage by stage. Stopped or killed, the same command goes on where it was."""
    from fewstep.train.recipe import recipe_error

    try:
        stopped = _stages_stopped(recipe, settings or (), out, stage or (), dry_run=dry_run, only_print=print_settings)
    except Exception as error:
        foreign = code_for(error) == Exit.BUG or isinstance(error, OSError)
        if foreign and (own := recipe_error(error, recipe)) is not None:
            raise own from error
        raise
    if stopped:
        raise typer.Exit(Exit.INTERRUPTED)


def _stages_stopped(
    recipe: Path, changes: Sequence[str], out: Path | None, names: Sequence[str], *, dry_run: bool, only_print: bool
) -> bool:
    """Carry the stages out, or try them, or print them; whether a signal stopped one."""
    from fewstep.train.distributed import shutdown_ranks
    from fewstep.train.overrides import overridden
    from fewstep.train.recipe import recipe_stages
    from fewstep.train.stages import selected

    stages = list(
        overridden(selected(recipe_stages(recipe, out or Path("runs") / recipe.stem), names), changes).values()
    )
    stopped = False
    for i, stage in enumerate(stages):
        _print_settings(stage)
        if dry_run:
            _try(stage, stages[:i])
        elif not only_print and not _finished(stage):
            stopped = True
            break
    shutdown_ranks()
    return stopped


def _try(stage: RecipeStage, earlier: Sequence[RecipeStage]) -> None:
    """Do what a stage does before its first step, if all that it begins with is there."""
    from fewstep.train.stages import dry_run, unfinished_dependency

    if (other := unfinished_dependency(stage, earlier)) is not None:
        _say(f"  begins with what {other.name} leaves in {other.plan.folder}, and is checked when that is there")
        return
    trainer, tried = dry_run(stage, before=_print_preflight)
    if trainer is None:
        _say(f"{stage.name}: done before, in {stage.plan.folder}")
    else:
        _say("  ready to train" if tried else "  ready to make its data; the first step is tried when they are there")


def _finished(stage: RecipeStage) -> bool:
    """Whether a stage is at its end: trained now, or before; not where it was told to stop."""
    from fewstep.train.record import write_record
    from fewstep.train.stages import run_stage

    trainer = run_stage(stage, before=_print_preflight)
    if trainer is None:
        _say(f"{stage.name}: done before, in {stage.plan.folder}")
        return True
    if trainer.stopping:
        saved = "nothing was saved" if trainer.saved is None else f"the checkpoint is of step {trainer.saved}"
        _say(f"{stage.name}: stopped at step {trainer.step}, {saved}; the same command goes on")
        return False
    write_record(stage, trainer)
    return True


def _print_settings(stage: RecipeStage) -> None:
    from fewstep.train.overrides import settings

    _say(f"{stage.name} ({type(stage.task).__name__})")
    _say("\n".join(f"  {name} = {value}" for name, value in settings(stage).items()))


def _print_preflight(stage: RecipeStage, trainer: Trainer) -> None:
    from fewstep.train.preflight import check_fits, estimate, parameter_counts

    check_fits(stage, trainer)
    forecast = estimate(stage, trainer)
    for name, (count, trained) in parameter_counts(trainer).items():
        _say(f"  {name}: {count:,} parameters, {trained:,} of them trained")
    _say(f"  {forecast}")
    if trainer.step:
        _say(f"  goes on at step {trainer.step}")


def _say(text: str) -> None:
    """Print, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)
