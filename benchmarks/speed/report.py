"""The text of results files: a table of runners, or of optimizations."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.speed.machine import Peaks
from benchmarks.speed.tasks import STAGES, Task
from benchmarks.speed.turns import RunnerResult


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a table is based on: hardware, numbers of runs and turns, arithmetic by stage, peaks, command and commit."""

    hardware: str
    runs: int
    turns: int
    flops: Mapping[str, float]
    peaks: Peaks
    command: str
    commit: str


def comparison(
    results: Sequence[RunnerResult], absent: Mapping[str, str], task: Task, facts: Facts, oracle: str
) -> str:
    """fewstep beside its peers; `absent`: the command that installs each runner that is not here."""
    good = [one for one in results if one.problem is None]
    best = min((one.middle for one in good if one.runner.peer), default=float("nan"))
    expected = next((one.output for one in good if one.runner.name == oracle), None)
    stage_names = stages_of(good)
    heads = [
        "runner",
        "s",
        "least to most",
        "times as fast as the fastest peer",
        *(f"{name}, s" for name in stage_names),
    ]
    heads += ["GFLOP/s (of the peak)", "peak GB", "error", "to load, s", "first output, s"]
    rows = []
    for one in good:
        error = "" if one.runner.name == oracle else format_error(one, expected)
        rows.append(
            [
                f"{one.runner.name} ({one.runner.versions()})",
                f"{one.middle:.3f}",
                spread(one),
                f"{best / one.middle:.2f}",
                *(_seconds(one.stage(name)) for name in stage_names),
                speed(one, facts),
                f"{one.peak / 1e9:.2f}",
                error,
                _list(one.loaded),
                _list(one.first),
            ]
        )
    lines = [*_opening(task, facts), *table(heads, rows), "", *_notes(task, oracle)]
    lines += [f"- {one.runner.name}: not run. {one.problem}" for one in results if one.problem]
    lines += [f"- {name}: not run, not installed; `{install}`" for name, install in absent.items()]
    return "\n".join([*lines, "", f"Commit: {facts.commit}. Command: `{facts.command}`", ""])


def waterfall(results: Sequence[RunnerResult], descriptions: Mapping[str, str], task: Task, facts: Facts) -> str:
    """fewstep with one more optimization in each row; `descriptions`: what each is."""
    good = [one for one in results if one.problem is None]
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
        name = one.runner.name
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
    lines += [f"- {one.runner.name}: not run. {one.problem}" for one in results if one.problem]
    return "\n".join([*lines, "", f"Commit: {facts.commit}. Command: `{facts.command}`", ""])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in markdown."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def spread(results: RunnerResult) -> str:
    """The fastest and the slowest run."""
    return f"{min(results.seconds):.3f} to {max(results.seconds):.3f}"


def speed(results: RunnerResult, facts: Facts) -> str:
    """GFLOP/s, and its share of the machine's peak."""
    reached = sum(facts.flops.values()) / results.middle
    return f"{reached / 1e9:,.0f} ({reached / max(facts.peaks.product, facts.peaks.convolution):.0%})"


def format_error(results: RunnerResult, expected: Any) -> str:
    """The largest difference as a share of the largest value; in words where it cannot be compared."""
    if not results.runner.comparable:
        return "other noise"
    return "" if expected is None else f"{np.abs(results.output - expected).max() / np.abs(expected).max():.1e}"


def counted(count: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {what}{'s' * (count != 1)}"


def stages_of(results: Sequence[RunnerResult]) -> list[str]:
    """The stages that some runner has measured."""
    return [name for name in STAGES if any(one.stage(name) is not None for one in results)]


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
        f"{arithmetic:,.0f} GFLOP by definition{parts}; this machine's own peaks in PyTorch: {facts.peaks.text()}.",
        "",
    ]


def _notes(task: Task, oracle: str) -> list[str]:
    memory = "the process's largest resident memory" if task.device == "cpu" else "what it takes of the card's memory"
    notes = [
        f"Error: the largest difference from the result of {oracle}, as a share of its largest value.",
        f"Peak GB: {memory}.",
        "First output: from the start of the process, imports and loading included, in each turn; what a runner",
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
