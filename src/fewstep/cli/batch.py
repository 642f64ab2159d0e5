"""`fewstep batch`: a file of prompts in, a folder of pictures out, on as many processes as `torchrun` starts."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fewstep.cli import checks, options, outputs, progress, recipe
from fewstep.cli.generate import tell, unknown_words
from fewstep.errors import InputError, quoted
from fewstep.files import file_size

if TYPE_CHECKING:
    from fewstep import Pipeline


COMPARED = (
    *(
        "prompt",
        "seed",
        "model",
        "negative_prompt",
        "steps",
        "guidance_scale",
        "sampler",
        "schedule",
        "width",
        "height",
    ),
    *("decoder", "dtype"),
)
"""Of what a picture says of itself: what makes it another one."""


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
    force: Annotated[bool, typer.Option("--force", help="Replace files that fewstep batch did not draw.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw a picture for each line of a file; empty lines and those that begin with # are none.

    Pictures that are there already and say that they were drawn so stay: the same command goes on. Those that were
    drawn from another line or with other settings are drawn anew.

    In front of it `torchrun --nproc-per-node 8 -m` shares the lines out over as many processes and cards.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    lines = read(prompts, output)
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
    checks.check(wanted)
    missing, others = sort(lines, wanted, seed, force=force)
    missing = missing[rank::ranks]
    if others and not quiet and rank == 0:
        tell(f"{others} of the pictures there were drawn from other lines or settings, and are drawn anew")
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
            part = missing[first : first + together]
            outputs.show(draw(pipe, wanted, part, seed))
            if not quiet:
                tell(*strange_words(pipe, part))
    if not quiet:
        seconds = perf_counter() - started
        count = f"{len(missing)} picture{'s' * (len(missing) > 1)}"
        tell(f"{count} in {seconds:.1f} s, loading included")


def read(prompts: Path, folder: Path) -> list[Line]:
    """The lines of a file that say something, in UTF-8, or UTF-16 with its mark. InputError for a file without any."""
    try:
        file_size(prompts)
        content = prompts.read_bytes()
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = content.decode("utf-16" if utf16 else "utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{quoted(prompts)} cannot be read as text: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{quoted(prompts)} cannot be read as text in UTF-8: {error.reason}; save it as that"
        ) from error
    prompted = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    prompted = [(number, line) for number, line in prompted if line and not line.startswith("#")]
    if not prompted:
        raise InputError(f"{quoted(prompts)} holds no prompt; write one a line")
    return [Line(number, prompt, folder / f"{number:05}.png") for number, prompt in prompted]


def sort(lines: list[Line], wanted: recipe.Recipe, seed: int, *, force: bool) -> tuple[list[Line], int]:
    """The lines to draw, and how many of their pictures are there but were drawn otherwise.

    InputError for files that something else made, unless `force` lets them go.
    """
    missing, others, foreign = [], 0, []
    for line in lines:
        if line.path.exists() or line.path.is_symlink():
            made = _made(line.path)
            if made is None and not force:
                foreign.append(line.path)
            if made is not None and made.items() >= _made_so(line, wanted, seed).items():
                continue
            others += made is not None
        missing.append(line)
    if foreign:
        raise InputError(
            f"{outputs.listed(foreign)} there, and not drawn by fewstep; name another folder with --output, or replace "
            "with --force"
        )
    return missing, others


def _made(path: Path) -> dict[str, Any] | None:
    """How fewstep drew a picture; None for another file."""
    from fewstep import images

    try:
        found = images.read_metadata(path)
    except InputError:
        return None
    if found is None or "fewstep" not in found:
        return None
    return {name: found.get(name) for name in COMPARED}


def _made_so(line: Line, wanted: recipe.Recipe, seed: int) -> dict[str, Any]:
    """What the picture of a line says of itself; without what is unknown before the model is loaded."""
    from fewstep.models.zoo import CATALOGUE
    from fewstep.pipeline.load import EMBEDDED
    from fewstep.pipeline.options import sampler_named
    from fewstep.weights.fetch import seen_from

    model = wanted.get("model", EMBEDDED)
    usual = checks.defaults_of(CATALOGUE.get(model))
    said = dict.fromkeys(("negative_prompt", "decoder", "dtype")) | (dict(vars(usual)) if usual else {})
    said |= {"model": seen_from(line.path.parent, model), "prompt": line.prompt, "seed": seed + line.number - 1}
    said |= {
        name: wanted[name] for name in COMPARED if name in wanted and name not in said.keys() & {"prompt", "model"}
    }
    if "sampler" in wanted:
        said["sampler"], schedule = sampler_named(wanted["sampler"])
        said |= {"schedule": schedule} if schedule and "schedule" not in wanted else {}
    return {name: value for name, value in said.items() if name != "schedule" or value is not None}


def strange_words(pipe: Pipeline, lines: list[Line]) -> list[str]:
    """A sentence for each line with words that the model does not know."""
    found = ((line.number, pipe.parts.tokenizers[0].unknown(line.prompt)) for line in lines)
    return [f"line {number}: {unknown_words(words, pipe.parts.name)}" for number, words in found if words]


def draw(pipe: Pipeline, wanted: recipe.Recipe, lines: list[Line], seed: int) -> list[Path]:
    """Draw these lines in one batch and save them, each with its own recipe; their paths."""
    from fewstep import images

    seeds = [seed + line.number - 1 for line in lines]
    given = {**recipe.keywords(wanted), "prompt": [line.prompt for line in lines], "seed": seeds}
    result = pipe.text_to_image(**given)
    for line, one, picture in zip(lines, seeds, result.images, strict=True):
        settings = recipe.metadata(wanted, {**result.settings, "prompt": line.prompt}, line.path.parent)
        images.save_png(picture, line.path, {**settings, "seed": one})
    return [line.path for line in lines]


def _own_card() -> str | None:
    """The card of this process, where torchrun has started one process for each."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None
