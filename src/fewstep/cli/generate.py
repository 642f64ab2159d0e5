"""`fewstep generate`: words in, PNG files out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli import outputs, progress, recipe

if TYPE_CHECKING:
    from fewstep import Pipeline, Result
    from fewstep.pipeline.options import Progress

    OnStep = Callable[[Progress], None]

SAMPLERS = (
    "euler, euler_ancestral, heun, ddim, plms, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, dpmpp_3m_sde, unipc, lcm, ddpm"
)
SCHEDULES = "leading, trailing, linspace, karras, exponential, sgm_uniform, simple, align_your_steps"
START, FINISH, MACHINE = "Starting from a picture", "Refining", "Machine"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The PNG file to write, or a folder. [default: fewstep-SEED.png]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Name, file, folder or hub id. [default: blocks-base, embedded]"),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out of the picture.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps. [default: the model's]")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "-g", help="How closely to follow the prompt.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=SAMPLERS)] = None,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULES)] = None,
    size: Annotated[str | None, typer.Option("--size", "-s", help="As 512x768, or 512 for a square.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same picture. [default: drawn]")] = None,
    images: Annotated[
        int | None, typer.Option("--images", "-n", help="How many; their seeds count up. [default: 1]")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Take every setting from this PNG; other options override it.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="A picture to start from.", rich_help_panel=START)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of it to redraw, 0 to 1.", rich_help_panel=START)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Redraw it only where this is white.", rich_help_panel=START)
    ] = None,
    refiner: Annotated[
        str | None, typer.Option(help="A model that finishes the picture.", rich_help_panel=FINISH)
    ] = None,
    handoff: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps before it takes over; with --strength it redraws instead. [default: 0.8]",
            rich_help_panel=FINISH,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: the best]", rich_help_panel=MACHINE)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16.", rich_help_panel=MACHINE)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the paths written, nothing else.")] = False,
) -> None:
    """Draw pictures from a prompt, and print the paths written."""
    asked = {name: value for name, value in locals().items() if value is not None}
    written = _generate(recipe.complete(asked), output, quiet)
    for path in written:
        typer.echo(path)


def _generate(wanted: recipe.Recipe, output: Path | None, quiet: bool) -> list[Path]:
    outputs.check(output)
    with progress.bar(shown=not quiet) as bar:
        bar.stage("loading")
        import fewstep

        place = {name: wanted.get(name) for name in ("device", "dtype")}
        pipe = fewstep.load(wanted.get("model"), **place)
        refiner = fewstep.load(wanted["refiner"], **place) if "refiner" in wanted else None
        bar.stage("reading")
        result = draw(pipe, refiner, wanted, bar.on_step)
        settings = recipe.metadata(wanted, result, outputs.folder_of(output))
        written = outputs.save(result, settings, output)
    if not quiet:
        print(summary(result), file=sys.stderr)
    return written


def draw(pipe: Pipeline, refiner: Pipeline | None, wanted: recipe.Recipe, on_step: OnStep) -> Result:
    """The pictures of the recipe `wanted`, by the task that its entries ask for."""
    shared = {**recipe.keywords(wanted), "on_step": on_step}
    prompt, init, mask = (wanted.get(name) for name in ("prompt", "init", "mask"))
    redraw = {name: wanted[name] for name in ("strength",) if name in wanted}
    if refiner and redraw and not init:
        return _redrawn(pipe.text_to_image(prompt, **shared), refiner, shared | redraw)
    if refiner:
        shared |= {"refiner": refiner, **{name: wanted[name] for name in ("handoff",) if name in wanted}}
    if mask:
        return pipe.inpaint(prompt, init, mask, **redraw, **shared)
    if init:
        return pipe.image_to_image(prompt, init, **redraw, **shared)
    return pipe.text_to_image(prompt, **shared)


def _redrawn(first: Result, refiner: Pipeline, keywords: recipe.Recipe) -> Result:
    """The pictures of `first` redrawn by `refiner` with the steps, guidance and sampler that drew them."""
    same = ("steps", "guidance_scale", "sampler", "schedule")
    keywords = {**keywords, **{name: first.settings[name] for name in same}, "images_per_prompt": 1}
    second = [
        refiner.image_to_image(first.settings["prompt"], image, **{**keywords, "seed": seed})
        for image, seed in zip(first.images, first.seeds, strict=True)
    ]
    return replace(first, images=tuple(result.images[0] for result in second))


def summary(result: Result) -> str:
    """One line for people: time, seed, tokens, and what of the prompt was not understood."""
    count, chunks, dropped = len(result.images), result.chunks, sum(result.tokens_dropped)
    parts = [
        f"{count} picture{'s' * (count > 1)} in {sum(result.seconds.values()):.1f} s",
        f"seed {result.seeds[0]}" if count == 1 else f"seeds {result.seeds[0]} to {result.seeds[-1]}",
        f"{result.tokens_used[0]} tokens" + f" in {chunks} chunks" * (chunks > 1),
    ]
    if dropped:
        parts.append(f"{dropped} tokens dropped")
    if result.unknown_words:
        parts.append(f"words the model does not know: {', '.join(result.unknown_words)}")
    return "; ".join(parts)
