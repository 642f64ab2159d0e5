"""`fewstep compare`: a blind side-by-side page, and the charts of the votes that people bring back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli import contenders, progress
from fewstep.cli.contenders import Contender
from fewstep.errors import InputError, unknown

if TYPE_CHECKING:
    from fewstep.compare.tally import Outcome


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
    seed: Annotated[int, typer.Option(min=0, help="Of pictures, sides and order.")] = 0,
    checks: Annotated[int | None, typer.Option(min=0, help="Attention checks (else one for ten prompts).")] = None,
    tally: Annotated[Path | None, typer.Option(help="Count the votes on the page in this folder.")] = None,
    judge: Annotated[str | None, typer.Option(help="A model that votes in place of people: reader.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (else the best here).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the paths written, and nothing else.")] = False,
) -> None:
    """Make a page on which people compare models blindly; with --tally count their votes and draw the chart."""
    _check_judge(judge)
    if tally is None:
        folder, files = _vacant(out), list[Path]()
        chosen = contenders.parsed(what or ())
        _make(chosen, prompts, folder, count=count, seed=seed, checks=checks, device=device, shown=not quiet)
        typer.echo(folder / "index.html")
    elif out or prompts:
        raise InputError("--tally counts the votes on a page that is there; leave out --out and --prompts")
    else:
        folder, files = tally, [Path(text) for text in what or ()]
    if tally or judge:
        outcome = _count(folder, files, judge)
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
    chosen: Sequence[Contender],
    prompts: Path | None,
    folder: Path,
    *,
    count: int,
    seed: int,
    checks: int | None,
    device: str | None,
    shown: bool,
) -> None:
    """Draw the pictures, one model after the other in memory, and write the page."""
    import fewstep
    from fewstep.compare.study import make_study

    texts = read_prompts(prompts, count) if prompts else held_out_prompts(count, seed)
    drawings = {}
    with progress.bar(shown=shown) as bar:
        for one in chosen:
            bar.stage("loading")
            pipe = fewstep.load(one.model, device=device)
            if prompts is None and pipe.parts.family != "blocks":
                raise InputError(f"{one.label} draws more than blocks; give prompts for it with --prompts FILE")
            drawings[one.label] = contenders.drawing(pipe, one, texts, seed=seed, on_step=bar.on_step)
    make_study(drawings, texts, folder, seed=seed, checks=-(-len(texts) // 10) if checks is None else checks)


def read_prompts(file: Path, count: int) -> list[str]:
    """The first `count` lines of `file` that are not empty; InputError if there is none."""
    try:
        lines = [" ".join(line.split()) for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file} cannot be read as text: {error}") from error
    found = [line for line in lines if line][:count]
    if not found:
        raise InputError(f"--prompts {file} holds no prompt; write one a line")
    return found


def held_out_prompts(count: int, seed: int) -> list[str]:
    """Different captions of block scenes that no training has seen."""
    from fewstep.blockworld import captions, scenes

    drawn = scenes(4 * count, seed=seed, split="heldout")
    return list(dict.fromkeys(captions(drawn, seed=seed, style="canonical")))[:count]


def _count(folder: Path, files: Sequence[Path], judge: str | None) -> Outcome:
    """Count votes, and write chart and table beside the page."""
    from fewstep.compare.chart import write_chart
    from fewstep.compare.judges import JUDGES, judged
    from fewstep.compare.study import read_study
    from fewstep.compare.tally import tallied
    from fewstep.compare.votes import read_ballot
    from fewstep.engines.cpu.limits import cap_threads
    from fewstep.tables import csv_text, write_text

    study = read_study(folder)
    ballots = [read_ballot(file, study.digest, {pair.id for pair in study.pairs}) for file in files]
    if judge is not None:
        with cap_threads(1):
            ballots.append(judged(study, folder, JUDGES[judge]()))
    outcome = tallied(study, ballots)
    stem = folder / ("preference" if outcome.judged_by is None else "preference-judged-by-model")
    table = stem.with_suffix(".csv")
    write_text(table, csv_text(outcome.rows()))
    for path in (*write_chart(outcome, stem), table):
        typer.echo(path)
    return outcome


def summary(outcome: Outcome) -> str:
    """What the votes say, for people: a line for each pair of models, and their strengths where there are many."""
    from fewstep.compare.chart import counted

    lines = [outcome.title, *(tally.statement() for tally in outcome.tallies), counted(outcome)]
    if outcome.left_out:
        lines.append(f"left out, since they missed attention checks: {', '.join(outcome.left_out)}")
    return "\n".join([*lines, *_strengths(outcome)])


def _strengths(outcome: Outcome) -> list[str]:
    """Bradley-Terry strengths of three models or more, with a word where the votes do not bound them."""
    from fewstep.metrics.bradley_terry import strengths

    lines = []
    for question in dict.fromkeys(tally.question for tally in outcome.tallies):
        votes = [tally.votes for tally in outcome.tallies if tally.question == question]
        if len(votes) < 2:
            continue
        try:
            found = strengths(votes)
        except InputError as error:
            lines.append(f"{question}, strengths: {error}")
            continue
        said = ", ".join(f"{name} {value:+.2f} ± {1.96 * error:.2f}" for name, (value, error) in found.items())
        lines.append(f"{question}, Bradley-Terry strengths with 95 % intervals: {said}")
    return lines
