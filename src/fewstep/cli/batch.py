"""`fewstep batch`: a file of prompts in, a folder of pictures out, on as many processes as `torchrun` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fewstep.cli import checks, options, outputs, progress
from fewstep.cli.generate import tell, unknown_words
from fewstep.cli.settings import complete_settings, task_keywords
from fewstep.errors import InputError
from fewstep.safety.provenance import Settings, image_metadata

if TYPE_CHECKING:
    from fewstep import Pipeline, Result
    from fewstep.pipeline.run import Run


_DRAWN_WITH = ("steps", "guidance_scale", "sampler", "schedule", "width", "height")
COMPARED = ("prompt", "seed", "model", "decoder", "dtype", "negative_prompt", *_DRAWN_WITH)
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
    lines = read(prompts, output)[rank::ranks]  # before a look at what is there: other processes add to it
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
    wanted = complete_settings({"prompt": "", **{name: value for name, value in asked.items() if value is not None}})
    checks.check(wanted)
    pipe = None
    load = partial(_loaded, wanted, device=device, quiet=quiet or rank > 0)
    if any(line.path.exists() for line in lines) and not _is_embedded(wanted):
        pipe = load()  # what it draws by default is not known before
    missing, others = sort(lines, _settings(wanted, pipe, output), seed, force=force)
    if others and not quiet:
        tell(f"{others} of the pictures there were drawn from other lines or settings, and are drawn anew")
    if not missing:
        return
    output.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    pipe = pipe or load()
    with progress.bar(shown=not quiet and rank == 0) as bar:
        bar.stage("drawing")
        parts = [missing[first : first + together] for first in range(0, len(missing), together)]
        for index, (part, result) in enumerate(drawn(pipe, wanted, parts, seed)):
            outputs.show(save(result, wanted, part))
            if not quiet:
                tell(*strange_words(pipe, part), *(result.notes if index == 0 else ()))
    if not quiet:
        seconds = perf_counter() - started
        count = f"{len(missing)} picture{'s' * (len(missing) > 1)}"
        tell(f"{count} in {seconds:.1f} s, loading included")


def read(prompts: Path, folder: Path) -> list[Line]:
    """The prompts of a file, with the path of each image in `folder`; InputError for a file without a prompt."""
    from fewstep.evaluate.prompts import numbered_prompts

    return [Line(number, prompt, folder / f"{number:05}.png") for number, prompt in numbered_prompts(prompts)]


def sort(lines: list[Line], settings: Settings, seed: int, *, force: bool) -> tuple[list[Line], int]:
    """The lines to draw with `settings`, and how many of their pictures are there but were drawn otherwise.

    InputError for files that something else made, unless `force` lets them go.
    """
    missing, others, foreign = [], 0, []
    for line in lines:
        if line.path.exists() or line.path.is_symlink():
            made = _made(line.path)
            if made is None and not force:
                foreign.append(line.path)
            same = {**settings, "prompt": line.prompt, "seed": seed + line.number - 1}
            if made is not None and made.items() >= same.items():
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
    """How fewstep drew a picture, nothing where it is damaged; None for another file."""
    from fewstep import images

    try:
        found = images.read_metadata(path)
    except InputError:
        return None
    if found is None or "fewstep" not in found:
        return None
    return {name: found.get(name) for name in COMPARED} if images.is_whole(path) else {}


def _is_embedded(wanted: Settings) -> bool:
    """Whether the model comes with fewstep, which knows all about it before it is loaded."""
    from fewstep.models.zoo import CATALOGUE
    from fewstep.pipeline.load import EMBEDDED

    known = CATALOGUE.get(wanted.get("model", EMBEDDED))
    return known is not None and known.source is None


def _settings(wanted: Settings, pipe: Pipeline | None, folder: Path) -> Settings:
    """What pictures in `folder` say of themselves, but for prompt and seed; of an embedded model without loading it."""
    from fewstep.inspect.catalogue import defaults_of
    from fewstep.models.zoo import CATALOGUE
    from fewstep.pipeline.load import EMBEDDED
    from fewstep.pipeline.request import sampler_named

    settings: Settings = dict.fromkeys(("negative_prompt", "decoder", "dtype"))
    if pipe is not None:
        settings |= pipe.start(**{**task_keywords(wanted), "seed": 0}).settings
    elif _is_embedded(wanted):
        model = wanted.get("model", EMBEDDED)
        settings |= {"model": model, **vars(defaults_of(CATALOGUE[model])), **task_keywords(wanted)}
        settings["sampler"], schedule = sampler_named(settings["sampler"])
        settings["schedule"] = wanted.get("schedule") or schedule or settings["schedule"]
    settings = image_metadata(wanted, settings, folder)
    return {name: settings[name] for name in COMPARED if name in settings}


def _loaded(wanted: Settings, *, device: str | None, quiet: bool) -> Pipeline:
    with progress.bar(shown=not quiet) as bar:
        bar.stage("loading")
        import fewstep

        how = {name: wanted.get(name) for name in ("dtype", "decoder")}
        return fewstep.load(wanted.get("model"), device=device or _own_card(), **how)


def strange_words(pipe: Pipeline, lines: list[Line]) -> list[str]:
    """A sentence for each line with words that the model does not know."""
    found = ((line.number, pipe.parts.tokenizers[0].unknown(line.prompt)) for line in lines)
    return [f"line {number}: {unknown_words(words, pipe.parts.name)}" for number, words in found if words]


def drawn(
    pipe: Pipeline, wanted: Settings, parts: Sequence[list[Line]], seed: int
) -> Iterator[tuple[list[Line], Result]]:
    """The parts' lines, each part drawn in one batch; a card begins with the next while the caller has the last."""
    from fewstep.engines.engine import Recorder

    under_way: list[tuple[list[Line], Run]] = []
    most = 1 if isinstance(pipe.engine, Recorder) else 0
    try:
        for lines in parts:
            seeds = [seed + line.number - 1 for line in lines]
            given = {**task_keywords(wanted), "prompt": [line.prompt for line in lines], "seed": seeds}
            under_way.append((lines, pipe.start(**given).launch()))
            while len(under_way) > most:
                yield _finished(under_way.pop(0))
    except (Exception, KeyboardInterrupt):  # what the card has drawn by then is not lost
        yield from map(_finished, under_way)
        raise
    yield from map(_finished, under_way)


def _finished(drawing: tuple[list[Line], Run]) -> tuple[list[Line], Result]:
    lines, run = drawing
    return lines, run.result()


def save(result: Result, wanted: Settings, lines: list[Line]) -> list[Path]:
    """Save the pictures of these lines, each with its own settings; their paths."""
    from fewstep import images

    for line, one, picture in zip(lines, result.seeds, result.images, strict=True):
        settings = image_metadata(wanted, {**result.settings, "prompt": line.prompt}, line.path.parent)
        images.save_png(picture, line.path, {**settings, "seed": one})
    return [line.path for line in lines]


def _own_card() -> str | None:
    """The card of this process, where torchrun has started one process for each."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None
