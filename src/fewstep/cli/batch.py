"""`fewstep batch`: one image for each prompt of a file, on as many processes as `torchrun` starts."""

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
"""The metadata of an image in which a difference means that it has to be generated anew."""


class Line(NamedTuple):
    """A prompt, its line number in the file from 1, and the path of its image."""

    number: int
    prompt: str
    path: Path


def batch(
    prompts: Annotated[Path, typer.Argument(help="A text file, one prompt a line.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the images, made if need be.")],
    together: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images generated at a time.")] = 8,
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
    force: Annotated[bool, typer.Option("--force", help="Replace files that fewstep batch did not write.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate an image for each line of a file; empty lines and those that begin with # are skipped.

    Images that exist with the same prompt and settings stay, so that the same command resumes; those of another
    prompt or other settings are generated anew.

    `torchrun --nproc-per-node 8 -m` in front of it shares the lines out over as many processes and cards.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    lines = read(prompts, output)[rank::ranks]  # before a look at what is there: other processes add to it
    given: Settings = {
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
    given = {name: value for name, value in given.items() if value is not None}
    run_settings = complete_settings({"prompt": "", **given})
    checks.check(run_settings)
    pipe = None
    load = partial(_load, run_settings, device=device, quiet=quiet or rank > 0)
    if any(line.path.exists() for line in lines) and not _is_embedded(run_settings):
        pipe = load()  # its defaults are not known before
    missing, changed = missing_images(lines, _expected_metadata(run_settings, pipe, output), seed, force=force)
    if changed and not quiet:
        tell(f"{changed} of the images there are of other prompts or settings, and are generated anew")
    if not missing:
        return
    output.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    pipe = pipe or load()
    batches = [missing[first : first + together] for first in range(0, len(missing), together)]
    with progress.bar(shown=not quiet and rank == 0) as bar:
        bar.stage("generating")
        _write_batches(pipe, run_settings, batches, seed, quiet=quiet)
    if not quiet:
        seconds = perf_counter() - started
        count = f"{len(missing)} image{'s' * (len(missing) > 1)}"
        tell(f"{count} in {seconds:.1f} s, loading included")


def _write_batches(
    pipe: Pipeline, run_settings: Settings, batches: list[list[Line]], seed: int, *, quiet: bool
) -> None:
    """Generate and save the images of all batches, and print their paths."""
    for index, (lines, result) in enumerate(generate_batches(pipe, run_settings, batches, seed)):
        outputs.show(save(result, run_settings, lines))
        if not quiet:
            tell(*unknown_word_lines(pipe, lines), *(result.notes if index == 0 else ()))


def read(prompts: Path, folder: Path) -> list[Line]:
    """The prompts of a file, with the path of each image in `folder`; InputError for a file without a prompt."""
    from fewstep.evaluate.prompts import numbered_prompts

    return [Line(number, prompt, folder / f"{number:05}.png") for number, prompt in numbered_prompts(prompts)]


def missing_images(lines: list[Line], settings: Settings, seed: int, *, force: bool) -> tuple[list[Line], int]:
    """The lines whose images are missing, and how many of them have an image of other settings.

    InputError for files that fewstep did not write, unless `force`.
    """
    missing, changed, foreign = [], 0, []
    for line in lines:
        if line.path.exists() or line.path.is_symlink():
            metadata = _metadata_of(line.path)
            if metadata is None and not force:
                foreign.append(line.path)
            same = {**settings, "prompt": line.prompt, "seed": seed + line.number - 1}
            if metadata is not None and metadata.items() >= same.items():
                continue
            changed += metadata is not None
        missing.append(line)
    if foreign:
        raise InputError(
            f"{outputs.listed(foreign)} there, and not generated by fewstep; name another folder with --output, or "
            "replace with --force"
        )
    return missing, changed


def _metadata_of(path: Path) -> dict[str, Any] | None:
    """The metadata of an image that fewstep wrote, empty where it is damaged; None for another file."""
    from fewstep import images

    try:
        metadata = images.read_metadata(path)
    except InputError:
        return None
    if metadata is None or "fewstep" not in metadata:
        return None
    return {name: metadata.get(name) for name in COMPARED} if images.is_whole(path) else {}


def _is_embedded(run_settings: Settings) -> bool:
    """Whether the model comes with fewstep, so that its defaults are known before it is loaded."""
    from fewstep.models.zoo import CATALOGUE
    from fewstep.pipeline.load import EMBEDDED

    known = CATALOGUE.get(run_settings.get("model", EMBEDDED))
    return known is not None and known.source is None


def _expected_metadata(run_settings: Settings, pipe: Pipeline | None, folder: Path) -> Settings:
    """The metadata of images in `folder`, without prompt and seed; an embedded model need not be loaded for it."""
    from fewstep.inspect.catalogue import defaults_of
    from fewstep.models.zoo import CATALOGUE
    from fewstep.pipeline.load import EMBEDDED
    from fewstep.pipeline.request import sampler_named

    settings: Settings = dict.fromkeys(("negative_prompt", "decoder", "dtype"))
    if pipe is not None:
        settings |= pipe.start(**{**task_keywords(run_settings), "seed": 0}).settings
    elif _is_embedded(run_settings):
        model = run_settings.get("model", EMBEDDED)
        settings |= {"model": model, **vars(defaults_of(CATALOGUE[model])), **task_keywords(run_settings)}
        settings["sampler"], schedule = sampler_named(settings["sampler"])
        settings["schedule"] = run_settings.get("schedule") or schedule or settings["schedule"]
    settings = image_metadata(run_settings, settings, folder)
    return {name: settings[name] for name in COMPARED if name in settings}


def _load(run_settings: Settings, *, device: str | None, quiet: bool) -> Pipeline:
    with progress.bar(shown=not quiet) as bar:
        bar.stage("loading")
        import fewstep

        how = {name: run_settings.get(name) for name in ("dtype", "decoder")}
        return fewstep.load(run_settings.get("model"), device=device or _own_card(), **how)


def unknown_word_lines(pipe: Pipeline, lines: list[Line]) -> list[str]:
    """A sentence for each line with words that the model does not know."""
    unknown = ((line.number, pipe.tokenizers[0].unknown(line.prompt)) for line in lines)
    return [f"line {number}: {unknown_words(words, pipe.spec.name)}" for number, words in unknown if words]


def generate_batches(
    pipe: Pipeline, run_settings: Settings, parts: Sequence[list[Line]], seed: int
) -> Iterator[tuple[list[Line], Result]]:
    """The lines and results of each batch; a graphics card begins with the next while the caller has the last."""
    from fewstep.engines.engine import Recorder

    under_way: list[tuple[list[Line], Run]] = []
    most = 1 if isinstance(pipe.engine, Recorder) else 0
    try:
        for lines in parts:
            seeds = [seed + line.number - 1 for line in lines]
            given = {**task_keywords(run_settings), "prompt": [line.prompt for line in lines], "seed": seeds}
            under_way.append((lines, pipe.start(**given).launch()))
            while len(under_way) > most:
                yield _finish(under_way.pop(0))
    except (Exception, KeyboardInterrupt):  # what the card has generated by then is not lost
        yield from map(_finish, under_way)
        raise
    yield from map(_finish, under_way)


def _finish(batch_run: tuple[list[Line], Run]) -> tuple[list[Line], Result]:
    lines, run = batch_run
    return lines, run.result()


def save(result: Result, run_settings: Settings, lines: list[Line]) -> list[Path]:
    """Save the images of these lines, each with its own settings; their paths."""
    from fewstep import images

    for line, one, image in zip(lines, result.seeds, result.images, strict=True):
        settings = image_metadata(run_settings, {**result.settings, "prompt": line.prompt}, line.path.parent)
        images.save_png(image, line.path, {**settings, "seed": one})
    return [line.path for line in lines]


def _own_card() -> str | None:
    """The card of this process, where torchrun has started one process for each."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None
