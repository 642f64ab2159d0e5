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
        list[str] | None, typer.Argument(help="key=value for all stages, STAGE.key=value for one: plan.rate=1e-5.")
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
    from fewstep.train.stages import chosen

    runs = list(overridden(chosen(recipe_stages(recipe, out or Path("runs") / recipe.stem), names), changes).values())
    stopped = False
    for i, run in enumerate(runs):
        _print_settings(run)
        if dry_run:
            _try(run, runs[:i])
        elif not only_print and not _finished(run):
            stopped = True
            break
    shutdown_ranks()
    return stopped


def _try(run: RecipeStage, earlier: Sequence[RecipeStage]) -> None:
    """Do what a stage does before its first step, if all that it begins with is there."""
    from fewstep.train.stages import dry_run, unfinished_dependency

    if (other := unfinished_dependency(run, earlier)) is not None:
        _say(f"  begins with what {other.name} leaves in {other.plan.folder}, and is checked when that is there")
        return
    trainer, tried = dry_run(run, before=_print_preflight)
    if trainer is None:
        _say(f"{run.name}: done before, in {run.plan.folder}")
    else:
        _say("  ready to train" if tried else "  ready to make its data; the first step is tried when they are there")


def _finished(run: RecipeStage) -> bool:
    """Whether a stage is at its end: trained now, or before; not where it was told to stop."""
    from fewstep.train.stages import run_stage

    trainer = run_stage(run, before=_print_preflight)
    if trainer is None:
        _say(f"{run.name}: done before, in {run.plan.folder}")
        return True
    if trainer.stopping:
        saved = "nothing was saved" if trainer.saved is None else f"the checkpoint is of step {trainer.saved}"
        _say(f"{run.name}: stopped at step {trainer.step}, {saved}; the same command goes on")
        return False
    if trainer.rank == 0 and (run.plan.folder / "model").is_dir():
        _write_record(run, trainer)
    return True


def _write_record(run: RecipeStage, trainer: Trainer) -> None:
    """Leave `training.json` beside the weights, with the stages that the model went through before."""
    from fewstep.cards.training_record import FILE, Training, TrainingStage, read_training
    from fewstep.files import atomic_write
    from fewstep.train.overrides import settings
    from fewstep.train.preflight import KG_PER_KWH, assumed_watts

    stage = TrainingStage(
        name=run.name,
        steps=trainer.step,
        batch=run.plan.batch,
        precision=run.plan.precision,
        hours=trainer.clock / 3600,
        watts=assumed_watts(trainer),
        hardware=_hardware(trainer),
        settings=settings(run),
    )
    start = Path(str(getattr(run.task, "student", None) or getattr(run.task, "model", "")))
    before = read_training(start).stages if (start / FILE).is_file() else ()
    record = Training(
        name=run.name,
        summary=f"Trained with fewstep by the recipe's stage {run.name}.",
        example="",
        licence="unknown",
        data=(),
        stages=(*before, stage),
        limits=(),
        kg_per_kwh=KG_PER_KWH,
    )
    with atomic_write(run.plan.folder / "model" / FILE) as file:
        file.write(record.to_json().encode())


def _hardware(trainer: Trainer) -> str:
    import platform

    import torch

    name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {platform.machine()}"
    )
    return f"{trainer.ranks} x {name}" if trainer.ranks > 1 and torch.cuda.is_available() else name


def _print_settings(run: RecipeStage) -> None:
    from fewstep.train.overrides import settings

    _say(f"{run.name} ({type(run.task).__name__})")
    _say("\n".join(f"  {name} = {value}" for name, value in settings(run).items()))


def _print_preflight(run: RecipeStage, trainer: Trainer) -> None:
    from fewstep.train.preflight import check_fits, estimate, parameter_counts

    check_fits(run, trainer)
    said = estimate(run, trainer)
    for name, (count, trained) in parameter_counts(trainer).items():
        _say(f"  {name}: {count:,} parameters, {trained:,} of them trained")
    _say(f"  {said}")
    if trainer.step:
        _say(f"  goes on at step {trainer.step}")


def _say(text: str) -> None:
    """Print, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)
