"""`fewstep batch`: a file of prompts in, a folder of pictures out, on as many processes as `torchrun` starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fewstep.cli import options, progress, recipe
from fewstep.errors import InputError

if TYPE_CHECKING:
    from fewstep import Pipeline


class Line(NamedTuple):
    """A prompt, its number in the file from 1, and where its picture goes."""

    number: int
    prompt: str
    path: Path


def batch(
    prompts: Annotated[Path, typer.Argument(help="A text file, one prompt a line.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the pictures, made if need be.")],
    together: Annotated[int, typer.Option("--batch", "-b", min=1, help="Pictures drawn at a time.")] = 8,
    model: options.Model = None,
    negative_prompt: options.NegativePrompt = None,
    steps: options.Steps = None,
    guidance_scale: options.Guidance = None,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    size: options.Size = None,
    seed: Annotated[int, typer.Option(help="Of the first line; the others count up.")] = 0,
    decoder: options.Decoder = None,
    device: options.Device = None,
    dtype: options.DType = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw a picture for each line of a file. Those that are there already stay: the same command goes on.

    In front of it `torchrun --nproc-per-node 8 -m` shares the lines out over as many processes and cards.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    missing = [line for line in read(prompts, output)[rank::ranks] if not line.path.exists()]
    asked = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "size": size,
        "sampler": sampler,
        "schedule": schedule,
        "model": model,
        "decoder": decoder,
        "dtype": dtype,
    }
    wanted = recipe.complete({"prompt": "", **{name: value for name, value in asked.items() if value is not None}})
    if not missing:
        return
    output.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    with progress.bar(shown=not quiet and rank == 0) as bar:
        bar.stage("loading")
        import fewstep

        pipe = fewstep.load(model, device=device or _own_card(), dtype=dtype, decoder=decoder)
        bar.stage("drawing")
        for first in range(0, len(missing), together):
            for path in draw(pipe, wanted, missing[first : first + together], seed):
                typer.echo(path)
    if not quiet:
        seconds = perf_counter() - started
        count = f"{len(missing)} picture{'s' * (len(missing) > 1)}"
        print(f"{count} in {seconds:.1f} s, loading included", file=sys.stderr)


def read(prompts: Path, folder: Path) -> list[Line]:
    """The lines of a file that say something. Raises InputError for a file without any."""
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{prompts} cannot be read as text in UTF-8: {error}") from error
    digits = max(5, len(str(len(lines))))
    told = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not told:
        raise InputError(f"{prompts} holds no prompt; write one a line")
    return [Line(number, prompt, folder / f"{number:0{digits}}.png") for number, prompt in told]


def draw(pipe: Pipeline, wanted: recipe.Recipe, lines: list[Line], seed: int) -> list[Path]:
    """Draw these lines in one batch and save them, each with its own recipe; their paths."""
    from fewstep import images

    seeds = [seed + line.number - 1 for line in lines]
    told = {**recipe.keywords(wanted), "prompt": [line.prompt for line in lines], "seed": seeds}
    result = pipe.text_to_image(**told)
    for line, one, picture in zip(lines, seeds, result.images, strict=True):
        settings = recipe.metadata(wanted, {**result.settings, "prompt": line.prompt}, line.path.parent)
        images.save_png(picture, line.path, {**settings, "seed": one})
    return [line.path for line in lines]


def _own_card() -> str | None:
    """The card of this process, where torchrun has started one process for each."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None
