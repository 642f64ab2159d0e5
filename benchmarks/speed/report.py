"""The results files: one table of contenders, or one of optimizations."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.speed.machine import Peaks
from benchmarks.speed.tasks import STAGES, Task
from benchmarks.speed.turns import Found


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a table stands on: hardware, numbers of runs and turns, arithmetic by stage, peaks, and the command."""

    hardware: str
    runs: int
    turns: int
    flops: Mapping[str, float]
    peaks: Peaks
    command: str


def comparison(found: Sequence[Found], absent: Mapping[str, str], task: Task, facts: Facts, oracle: str) -> str:
    """fewstep beside its peers; `absent`: the command that installs each contender that is not here."""
    good = [one for one in found if one.problem is None]
    best = min((one.middle for one in good if one.contender.peer), default=float("nan"))
    expected = next((one.output for one in good if one.contender.name == oracle), None)
    named = stages_of(good)
    heads = ["contender", "s", "least to most", "times as fast as the fastest peer", *(f"{name}, s" for name in named)]
    heads += ["GFLOP/s (of the peak)", "peak GB", "error", "to load, s", "first output, s"]
    rows = []
    for one in good:
        error = "" if one.contender.name == oracle else format_error(one, expected)
        rows.append(
            [
                f"{one.contender.name} ({one.contender.said()})",
                f"{one.middle:.3f}",
                spread(one),
                f"{best / one.middle:.2f}",
                *(_seconds(one.stage(name)) for name in named),
                speed(one, facts),
                f"{one.peak / 1e9:.2f}",
                error,
                _list(one.loaded),
                _list(one.first),
            ]
        )
    lines = [*_opening(task, facts), *table(heads, rows), "", *_notes(task, oracle)]
    lines += [f"- {one.contender.name}: not run. {one.problem}" for one in found if one.problem]
    lines += [f"- {name}: not run, not installed; `{install}`" for name, install in absent.items()]
    return "\n".join([*lines, "", f"Command: `{facts.command}`", ""])


def waterfall(found: Sequence[Found], descriptions: Mapping[str, str], task: Task, facts: Facts) -> str:
    """fewstep with one more optimization in each row; `descriptions`: what each is."""
    good = [one for one in found if one.problem is None]
    heads = [
        "optimization",
        "s",
        "least to most",
        "gives",
        "in all",
        "GFLOP/s (of the peak)",
        "peak GB",
        "error",
        "what it is",
    ]
    rows = []
    for before, one in pairwise([*good[:1], *good]):
        name = one.contender.name
        rows.append(
            [
                name,
                f"{one.middle:.3f}",
                spread(one),
                "" if one is before else f"x {before.middle / one.middle:.2f}",
                f"x {good[0].middle / one.middle:.2f}",
                speed(one, facts),
                f"{one.peak / 1e9:.2f}",
                "" if one is good[0] else format_error(one, good[0].output),
                descriptions.get(name, ""),
            ]
        )
    lines = [*_opening(task, facts, "one optimization after the other"), *table(heads, rows), ""]
    lines += ["Every row has the optimizations of those above it too. Error: the largest difference from the first"]
    lines[-1] += " row's result, as a share of its largest value."
    lines += [f"- {one.contender.name}: not run. {one.problem}" for one in found if one.problem]
    return "\n".join([*lines, "", f"Command: `{facts.command}`", ""])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in markdown."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def spread(found: Found) -> str:
    """The fastest and the slowest run."""
    return f"{min(found.seconds):.3f} to {max(found.seconds):.3f}"


def speed(found: Found, facts: Facts) -> str:
    """FLOP/s by definition, and what share that is of the machine's own best."""
    reached = sum(facts.flops.values()) / found.middle
    return f"{reached / 1e9:,.0f} ({reached / max(facts.peaks.product, facts.peaks.convolution):.0%})"


def format_error(found: Found, expected: Any) -> str:
    """The largest difference as a share of the largest value; nothing to compare with is said as such."""
    if not found.contender.comparable:
        return "other noise"
    return "" if expected is None else f"{np.abs(found.output - expected).max() / np.abs(expected).max():.1e}"


def counted(count: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {what}{'s' * (count != 1)}"


def stages_of(found: Sequence[Found]) -> list[str]:
    """The stages that some contender has measured."""
    return [name for name in STAGES if any(one.stage(name) is not None for one in found)]


def title(task: Task) -> str:
    """What is measured."""
    decoder = ", tiny decoder" if task.decoder else ""
    steps = f", {counted(task.steps, 'step')} of {task.sampler}" if task.part == "whole" else ""
    guidance = f", guidance {task.guidance:g}" if task.part == "whole" and task.guided else ""
    what = "text to image" if task.part == "whole" else task.part
    return f"{task.model}, {what}, {task.size} px, batch {task.batch}{steps}{guidance}{decoder}"


def _opening(task: Task, facts: Facts, what: str = "") -> list[str]:
    arithmetic = sum(facts.flops.values()) / 1e9
    shares = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in facts.flops.items())
    parts = f" ({shares})" if len(facts.flops) > 1 else ""
    where = counted(task.threads, "thread") if task.device == "cpu" else task.device
    runs, turns = counted(facts.runs, "run"), counted(min(facts.turns, facts.runs), "turn")
    return [
        f"# {title(task)}{': ' * bool(what)}{what}",
        "",
        f"{facts.hardware}, {where}, {task.dtype}, random weights, {datetime.date.today()}. Medians of "
        f"{runs} in {turns}, each turn in a new process whose first run does not count. "
        f"{arithmetic:,.0f} GFLOP by definition{parts}; this machine's own peaks in PyTorch: {facts.peaks.said()}.",
        "",
    ]


def _notes(task: Task, oracle: str) -> list[str]:
    memory = "the process's largest resident memory" if task.device == "cpu" else "what it takes of the card's memory"
    notes = [
        f"Error: the largest difference from the result of {oracle}, as a share of its largest value.",
        f"Peak GB: {memory}.",
        "First output: from the start of the process, imports and loading included, in each turn; what a contender",
        "compiles, measures or caches for itself counts in the first turn; what it has converted is there before.",
    ]
    if task.part == "whole":
        notes.append("Each run has a prompt of its own.")
    if task.part == "unet":
        notes.append("The text states are the same in each run, as in all steps of one prompt.")
    return [" ".join(notes)]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
