"""`fewstep evaluate`: metrics of models and images, in reports that name every network involved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli import progress
from fewstep.errors import InputError

if TYPE_CHECKING:
    import torch

    from fewstep.evaluate.image_cache import ImageCache

    LoadCache = Callable[[str], ImageCache]

EMBEDDED = "blocks-base"
SCALES = "1.5,2,3,4,5,6,7,8"

app = typer.Typer(help="Measure models: prompts followed, FID, CLIP score, diversity, copies of training images.")

_MODELS = "Names, folders, files or hub ids (else blocks-base)"
Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help=f"{_MODELS}.", show_default=False)]
ModelsAndSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help=f"{_MODELS}, with settings if need be: blocks-base:steps=4.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="A folder; images in it are not generated again.")]
Features = Annotated[
    Path | None, typer.Option(help="A TorchScript Inception, or the folder of a CLIP (else fewstep's own, for blocks).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (else the best here).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the path of the report, and nothing else.")]


@app.command()
def blocks(
    models: ModelsAndSettings = None,
    *,
    base: Annotated[str, typer.Option(help="What the others are compared with.")] = EMBEDDED,
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts of either kind.")] = 1000,
    varied: Annotated[int, typer.Option(min=1, help="Prompts with 16 seeds each, for diversity.")] = 32,
    training: Annotated[int, typer.Option(min=1, help="Renders of training scenes searched for copies.")] = 5000,
    trained_on: Annotated[Path | None, typer.Option(help="A folder of training images to search instead.")] = None,
    features: Features = None,
    output: Output = Path("evaluation"),
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """How well block models follow prompts, by two readers; diversity, FID and copies of training images.

    A model that takes 4 steps or fewer by default is measured at 1 and at 4, and so is the base.
    """
    with _caches(output, device, shown=not quiet) as load_cache:
        from fewstep.evaluate.blocks.report import write_blocks
        from fewstep.evaluate.blocks.suite import SampleSizes
        from fewstep.evaluate.candidates import load_candidates
        from fewstep.metrics.features import load_features

        sizes = SampleSizes(count=count, varied=varied, training=training, trained_on=trained_on)
        path = write_blocks(
            load_candidates(models or (), base, load_cache),
            sizes,
            load_features(features, device=_place(device)),
            output,
        )
    typer.echo(path)


@app.command()
def pareto(
    models: Models = None,
    *,
    scales: Annotated[str, typer.Option(help="Guidance scales.")] = SCALES,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    sampler: Annotated[str, typer.Option(help="As of `fewstep generate`.")] = "plms",
    count: Annotated[int, typer.Option(min=10, help="Images a point.")] = 1000,
    prompts: Annotated[Path | None, typer.Option(help="A file, one a line (else held-out block captions).")] = None,
    real: Annotated[Path | None, typer.Option(help="A folder of real images (else renders of blocks).")] = None,
    renders: Annotated[int, typer.Option(min=10, help="Of blocks: FID takes them as exact.")] = 4000,
    clip: Annotated[Path | None, typer.Option(help="The folder of a CLIP (else fewstep's own, for blocks).")] = None,
    features: Features = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels (else the model's own).")] = None,
    output: Output = Path("evaluation"),
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """FID against CLIP score over guidance scales: table and chart, as the card of Stable Diffusion v1-4 has it."""
    scale_list = _scales(scales)
    with _caches(output, device, shown=not quiet) as load_cache:
        from fewstep.evaluate.pareto.suite import GuidanceSweep, SweepSettings, prompt_set, write_pareto
        from fewstep.metrics.clip_score import load_clip
        from fewstep.metrics.features import load_features

        caches = [load_cache(name) for name in dict.fromkeys(models or [EMBEDDED])]
        place = _place(device)
        network = load_clip(clip, place)
        settings = SweepSettings(scales=scale_list, steps=steps, sampler=sampler, side=size)
        side = size or caches[0].pipe.spec.defaults.width
        prompts_and_real = prompt_set(count, prompts, real, side=side, renders=renders)
        path = write_pareto(
            caches, GuidanceSweep(prompts_and_real, settings, network, load_features(features, network, place)), output
        )
    typer.echo(path)


@app.command()
def fid(
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="A folder of generated images.")],
    real: Annotated[Path, typer.Argument(help="A folder of real images.")],
    *,
    features: Features = None,
    output: Output = Path("evaluation"),
    device: Device = None,
) -> None:
    """FID and KID of the images in one folder against those in another."""
    from fewstep.evaluate.folders import write_fid
    from fewstep.metrics.features import load_features

    typer.echo(write_fid(generated, real, load_features(features, device=_place(device)), output))


@contextmanager
def _caches(output: Path, device: str | None, *, shown: bool) -> Iterator[LoadCache]:
    """The function that loads a model and its image cache in `output`, with a progress bar around its use."""
    with progress.bar(shown=shown) as bar:
        bar.stage("loading")
        import fewstep
        from fewstep.evaluate.image_cache import ImageCache

        def on_progress(done: int, total: int) -> None:
            bar.bars.update(bar.task, description="generating", total=total, completed=done)

        yield lambda name: ImageCache(name, fewstep.load(name, device=device), output / "pictures", on_progress)


def _place(device: str | None) -> torch.device:
    from fewstep.engines.device import choose_device

    return choose_device(device)


def _scales(text: str) -> list[float]:
    """Guidance scales written `1.5,2,3`."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--scales {text!r} are not numbers with commas between them, as {SCALES}") from None
