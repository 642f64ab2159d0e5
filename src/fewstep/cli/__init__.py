"""The `fewstep` command: one file for each sub-command; nothing heavy is imported before one runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fewstep.cli import batch, bench, card, compare, data, evaluate, exits, generate, inspect, models, train

app = typer.Typer(
    name="fewstep",
    help="Generate images from text with latent diffusion models.",
    epilog='Start here:  fewstep generate "a red cube on top of a blue sphere" -o cube.png',
    rich_markup_mode="rich",
)
app.command("generate")(generate.generate)
app.command("batch")(batch.batch)
app.command("models")(models.models)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("card")(card.card)
app.command("emissions")(card.emissions)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(data.app, name="data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` without one) and return its exit code, see `exits.Exit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"] or ["--help"]
    try:
        code = app(words, prog_name="fewstep", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return exits.end_on_broken_pipe()
    except Exception as error:
        return exits.report(error, debug="--debug" in given)
    return code if isinstance(code, int) else 0


def _show_version(requested: bool) -> None:
    if requested:
        from fewstep import __version__

        typer.echo(f"fewstep {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Hold the options of the bare command; `main` has taken `--debug` out, wherever it stood."""
