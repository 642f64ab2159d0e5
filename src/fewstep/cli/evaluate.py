"""`fewstep evaluate`: what models and pictures are worth, in reports that name every network that judged."""

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

    from fewstep.evaluate.image_cache import Easel

    SetUp = Callable[[str], Easel]

EMBEDDED = "blocks-base"
SCALES = "1.5,2,3,4,5,6,7,8"

app = typer.Typer(help="Measure what models draw: prompts drawn right, FID, CLIP score, diversity, copies.")

_MODELS = "Names, folders, files or hub ids (else blocks-base)"
Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help=f"{_MODELS}.", show_default=False)]
ModelsAndSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help=f"{_MODELS}, with settings if need be: blocks-base:steps=4.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="A folder; pictures in it are not drawn again.")]
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
    varied: Annotated[int, typer.Option(min=1, help="Prompts drawn with 16 seeds each, for diversity.")] = 32,
    training: Annotated[int, typer.Option(min=1, help="Renders of training scenes searched for copies.")] = 5000,
    trained_on: Annotated[Path | None, typer.Option(help="A folder of training pictures to search instead.")] = None,
    features: Features = None,
    output: Output = Path("evaluation"),
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """How often block models draw what is asked, by two readers; how varied, and whether from memory.

    A model that draws in 4 steps or fewer is taken at 1 and at 4, and so is the base.
    """
    with _studio(output, device, shown=not quiet) as set_up:
        from fewstep.evaluate.blocks.report import write_blocks
        from fewstep.evaluate.blocks.suite import Extent
        from fewstep.evaluate.candidates import contestants
        from fewstep.metrics.features import load_features

        extent = Extent(count=count, varied=varied, training=training, trained_on=trained_on)
        path = write_blocks(
            contestants(models or (), base, set_up), extent, load_features(features, device=_place(device)), output
        )
    typer.echo(path)


@app.command()
def pareto(
    models: Models = None,
    *,
    scales: Annotated[str, typer.Option(help="Guidance scales.")] = SCALES,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    sampler: Annotated[str, typer.Option(help="As of `fewstep generate`.")] = "plms",
    count: Annotated[int, typer.Option(min=10, help="Pictures a point.")] = 1000,
    prompts: Annotated[Path | None, typer.Option(help="A file, one a line (else held-out block captions).")] = None,
    real: Annotated[Path | None, typer.Option(help="A folder of real pictures (else renders of blocks).")] = None,
    renders: Annotated[int, typer.Option(min=10, help="Of blocks: FID takes them as exact.")] = 4000,
    clip: Annotated[Path | None, typer.Option(help="The folder of a CLIP (else fewstep's own, for blocks).")] = None,
    features: Features = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures (else the model's own).")] = None,
    output: Output = Path("evaluation"),
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """FID against CLIP score over guidance scales: table and chart, as the card of Stable Diffusion v1-4 has it."""
    chosen = _scales(scales)
    with _studio(output, device, shown=not quiet) as set_up:
        from fewstep.evaluate.pareto.suite import Scales, Sweep, subject, write_pareto
        from fewstep.metrics.clip_score import load_clip
        from fewstep.metrics.features import load_features

        easels = [set_up(name) for name in dict.fromkeys(models or [EMBEDDED])]
        place = _place(device)
        judge = load_clip(clip, place)
        how = Sweep(scales=chosen, steps=steps, sampler=sampler, side=size)
        side = size or easels[0].pipe.parts.defaults.width
        asked = subject(count, prompts, real, side=side, renders=renders)
        path = write_pareto(easels, Scales(asked, how, judge, load_features(features, judge, place)), output)
    typer.echo(path)


@app.command()
def fid(
    drawn: Annotated[Path, typer.Argument(help="A folder of pictures.")],
    real: Annotated[Path, typer.Argument(help="A folder of what they should look like.")],
    *,
    features: Features = None,
    output: Output = Path("evaluation"),
    device: Device = None,
) -> None:
    """FID and KID of the pictures in one folder against those in another."""
    from fewstep.evaluate.folders import write_fid
    from fewstep.metrics.features import load_features

    typer.echo(write_fid(drawn, real, load_features(features, device=_place(device)), output))


@contextmanager
def _studio(output: Path, device: str | None, *, shown: bool) -> Iterator[SetUp]:
    """What sets a model up to draw into `output`, with a bar that shows how far it is."""
    with progress.bar(shown=shown) as bar:
        bar.stage("loading")
        import fewstep
        from fewstep.evaluate.image_cache import Easel

        def told(done: int, total: int) -> None:
            bar.bars.update(bar.task, description="drawing", total=total, completed=done)

        yield lambda name: Easel(name, fewstep.load(name, device=device), output / "pictures", told)


def _place(device: str | None) -> torch.device:
    from fewstep.engines.device import choose_device

    return choose_device(device)


def _scales(text: str) -> list[float]:
    """Guidance scales written `1.5,2,3`."""
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--scales {text!r} are not numbers with commas between them, as {SCALES}") from None
