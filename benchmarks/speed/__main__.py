"""Speed on a CPU, beside the peers: every contender in a process of its own, running in turn, on the same weights.

    python -m benchmarks.speed --model sd-turbo --part decode --size 512 --hardware NAME [--batch 1] [--runs 5]

Random weights of the real architecture are made once and kept in `--cache`. Each contender loads, runs once without
counting, and then `--runs` times in turn with the others. Written to `results/`: medians, spread, ratios to the fastest
peer, peak memory, the error against diffusers in float32, FLOP/s beside what this machine's own matrix products and
convolutions reach, versions and the command. A peer that is not installed is listed with the command that installs it.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing as mp
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.contenders import CONTENDERS, ORACLE, Task, Told, serve
from benchmarks.speed.machine import flops, peaks
from benchmarks.speed.models import random_model

RESULTS = Path(__file__).parent.parent / "results"
GIVE_UP = 1800.0
"""Seconds to wait for a contender."""


class Found(NamedTuple):
    """All that a contender said: seconds to load, seconds of each run, peak memory, its output; or what went wrong."""

    name: str
    loaded: float = 0.0
    seconds: tuple[float, ...] = ()
    peak: int = 0
    output: Any = None
    problem: str | None = None


def measured(names: list[str], task: Task, runs: int) -> list[Found]:
    """Every contender on the task: all loaded, then by turns."""
    context, lines = mp.get_context("spawn"), dict[str, Connection]()
    found = {name: Found(name) for name in names}
    for name in names:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(name, task, theirs), daemon=True).start()
        lines[name] = ours
        found[name] = _noted(found[name], _answer(ours), loading=True)
    for run in range(runs + 1):
        for name in names:
            if found[name].problem is None:
                lines[name].send(True)
                told = _answer(lines[name])
                found[name] = _noted(found[name], told, counted=run > 0)
    for line in lines.values():
        line.close()
    return list(found.values())


def _answer(line: Connection) -> Told | str:
    if not line.poll(GIVE_UP):
        return f"no answer in {GIVE_UP:.0f} s"
    try:
        return line.recv()  # type: ignore[no-any-return]
    except EOFError:
        return "its process ended (out of memory?)"


def _noted(found: Found, told: Told | str, *, loading: bool = False, counted: bool = False) -> Found:
    if isinstance(told, str):
        return found._replace(problem=told)
    if loading:
        return found._replace(loaded=told.seconds, peak=told.peak_bytes)
    seconds = (*found.seconds, told.seconds) if counted else found.seconds
    return found._replace(seconds=seconds, peak=told.peak_bytes, output=told.output)


def report(found: list[Found], absent: dict[str, str], task: Task, asked: argparse.Namespace) -> str:
    """The results file."""
    good = [one for one in found if one.problem is None]
    best = min((median(one.seconds) for one in good if CONTENDERS[one.name].peer), default=float("nan"))
    oracle = next((one.output for one in good if one.name == ORACLE), None)
    total = flops(task)
    lines = [
        f"# {asked.model}, {task.part}, {task.size} px, batch {task.batch}",
        "",
        f"{asked.hardware}, {task.threads} threads, float32, random weights, {datetime.date.today()}. Medians of "
        f"{asked.runs} runs by turns, after one that does not count. {total / 1e9:,.0f} GFLOP by definition; this "
        f"machine's own peaks: {peaks(task.threads)}.",
        "",
        "| contender | s | least to most | faster than the fastest peer | GFLOP/s | peak GB | error | to load, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in good:
        middle, error = median(one.seconds), ""
        if oracle is not None and one.name != ORACLE:
            error = f"{np.abs(one.output - oracle).max() / np.abs(oracle).max():.1e}"
        cells = [
            f"{one.name} ({CONTENDERS[one.name].said()})",
            f"{middle:.3f}",
            f"{min(one.seconds):.3f} to {max(one.seconds):.3f}",
            f"{best / middle:.2f}",
            f"{total / middle / 1e9:,.0f}",
            f"{one.peak / 1e9:.2f}",
            error,
            f"{one.loaded:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Error: the largest difference from diffusers', as a share of its largest value."]
    lines += [f"- {one.name}: not run. {one.problem}" for one in found if one.problem]
    lines += [f"- {name}: not run; `{install}`" for name, install in absent.items()]
    command = f"--model {asked.model} --part {task.part} --size {task.size} --batch {task.batch} --runs {asked.runs}"
    command += f' --threads {task.threads} --peers "{asked.peers}" --hardware {asked.hardware}'
    return "\n".join([*lines, "", f"Command: `python -m benchmarks.speed {command}`.", ""])


def main() -> None:
    """Measure and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd-turbo")
    parser.add_argument("--part", choices=("decode", "encode", "unet"), default="decode")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default="all", help="names with a + between them, or all")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    asked = parser.parse_args()
    wanted = list(CONTENDERS) if asked.peers == "all" else asked.peers.split("+")
    absent = {name: install for name in wanted if (install := CONTENDERS[name].missing())}
    task = Task(random_model(asked.model, asked.cache), asked.part, asked.size, asked.batch, asked.threads)
    found = measured([name for name in wanted if name not in absent], task, asked.runs)
    what = f"speed_{asked.model}_{task.part}_{task.size}_b{task.batch}"
    path = RESULTS / f"{what}_{asked.hardware}_{datetime.date.today()}.md"
    path.write_text(report(found, absent, task, asked), encoding="utf-8")
    print(path.read_text(encoding="utf-8"), path, sep="\n")


if __name__ == "__main__":
    main()
