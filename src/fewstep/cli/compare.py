"""`fewstep compare`: a page for blind comparison of models, and charts of the votes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli import progress
from fewstep.errors import InputError, unknown

if TYPE_CHECKING:
    from fewstep.evaluate.candidates import Candidate


def compare(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODELS... | VOTES...",
            help="Names, folders, files or hub ids, with settings if need be: blocks-base:steps=4,guidance_scale=1. "
            "With --tally the files of votes.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder for the page.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file, one a line (else held-out block scenes).")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many prompts at most.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of images, sides and order.")] = 0,
    checks: Annotated[int | None, typer.Option(min=0, help="Attention checks (else one for ten prompts).")] = None,
    tally: Annotated[Path | None, typer.Option(help="Count the votes on the page in this folder.")] = None,
    judge: Annotated[str | None, typer.Option(help="A model that votes in place of people: reader.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (else the best here).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the paths written, and nothing else.")] = False,
) -> None:
    """Make a page on which people compare models blindly; with --tally count their votes and write the chart."""
    _check_judge(judge)
    if tally is None:
        folder, files = _vacant(out), list[Path]()
        from fewstep.evaluate.candidates import distinct_candidates

        candidates = distinct_candidates(what or ())
        _make(candidates, prompts, folder, count=count, seed=seed, checks=checks, device=device, shown=not quiet)
        typer.echo(folder / "index.html")
    elif out or prompts:
        raise InputError("--tally counts the votes on a page that is there; leave out --out and --prompts")
    else:
        folder, files = tally, [Path(text) for text in what or ()]
    if tally or judge:
        from fewstep.compare.report import summary, write_report

        outcome, paths = write_report(folder, files, judge)
        for path in paths:
            typer.echo(path)
        if not quiet:
            print(summary(outcome), file=sys.stderr)


def _check_judge(judge: str | None) -> None:
    if judge is not None:
        from fewstep.compare.judges import JUDGES

        if judge not in JUDGES:
            raise InputError(unknown("judge", judge, JUDGES))


def _vacant(out: Path | None) -> Path:
    from fewstep.compare.study import check_vacant

    if out is None:
        raise InputError("no --out; name a new folder for the page")
    check_vacant(out)
    return out


def _make(
    candidates: Sequence[Candidate],
    prompts: Path | None,
    folder: Path,
    *,
    count: int,
    seed: int,
    checks: int | None,
    device: str | None,
    shown: bool,
) -> None:
    """Generate the images, with one model after the other in memory, and write the page."""
    import fewstep
    from fewstep.compare.study import ImageSet, make_study
    from fewstep.evaluate.candidates import generate_images
    from fewstep.evaluate.prompts import held_out_prompts, read_prompts

    texts = read_prompts(prompts, count) if prompts else held_out_prompts(count, seed)
    image_sets = {}
    with progress.bar(shown=shown) as bar:
        for candidate in candidates:
            bar.stage("loading")
            pipe = fewstep.load(candidate.model, device=device)
            if prompts is None and pipe.spec.family != "blocks":
                raise InputError(f"{candidate.label} is no block model; give prompts for it with --prompts FILE")
            settings, images = generate_images(candidate, pipe, texts, seed=seed, on_step=bar.on_step)
            image_sets[candidate.label] = ImageSet(settings=settings, images=images)
    make_study(image_sets, texts, folder, seed=seed, checks=-(-len(texts) // 10) if checks is None else checks)
