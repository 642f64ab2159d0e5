"""Measurements in a process of their own, which is ended when a case takes too long."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.speed.runners import Runner
from benchmarks.speed.tasks import Run, Task
from benchmarks.speed.turns import answer, error_line, prepared, process

RUNS, FEW, ENOUGH, LONG = 20, 3, 5.0, 1.0
"""Runs of a row, and of one that takes over `LONG` seconds; seconds after which no further run begins."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Seconds of the runs of a case, or the `problem` that ended it.

    `loaded`: seconds until its engine was there, `first`: of the first run, which compiles, chooses and records.
    `peak`: bytes that PyTorch held of the card's memory. `output`: of one network, else None.
    """

    seconds: tuple[float, ...] = ()
    loaded: float = 0.0
    first: float = 0.0
    peak: int = 0
    output: Any = None
    problem: str | None = None

    @property
    def middle(self) -> float:
        """The median run in seconds."""
        return median(self.seconds)


def measure_isolated(cases: Sequence[tuple[Runner, Task]], seconds: float) -> Iterator[CaseResult]:
    """The results of the cases, measured in one process, or in a new one after a failure.

    A case that takes over `seconds` is ended, which is its problem.
    """
    done = 0
    while done < len(cases):
        runner, task = cases[done]
        problem = prepared(runner, task, seconds)
        if problem is not None:
            yield CaseResult(problem=problem)
            done += 1
            continue
        stop = done + 1 if runner.prepare else len(cases)
        with process(serve_cases, cases[done:stop], environment=runner.environment, patience=5) as line:
            while done < stop and problem is None:
                reply = answer(line, seconds)
                measured = CaseResult(problem=reply) if isinstance(reply, str) else reply
                problem = measured.problem
                done += 1
                yield measured


def serve_cases(cases: Sequence[tuple[Runner, Task]], line: Connection) -> None:
    """Send the result of each case until one has failed, which could make later ones fail too."""
    for runner, task in cases:
        measured = measure_case(runner, task)
        line.send(measured)
        if measured.problem is not None:
            return


def measure_case(runner: Runner, task: Task) -> CaseResult:
    """The result of a case in this process."""
    try:
        return _measured(runner, task)
    except Exception as error:  # whatever an engine raises is a row of the table
        return CaseResult(problem=error_line(error))


def _measured(runner: Runner, task: Task) -> CaseResult:
    import torch

    on_card = task.device.startswith("cuda")
    gc.collect()
    if on_card:
        torch.cuda.init()  # without it a new process has no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(task.device)
    started = perf_counter()
    run = runner.load(task, **runner.options)
    if on_card:
        torch.cuda.synchronize(task.device)
    loaded = perf_counter()
    output = run().output
    first = perf_counter() - loaded
    run()
    seconds = timed(run)
    if output is not None:
        output = output.float().cpu().numpy() if hasattr(output, "cpu") else output
    peak = torch.cuda.max_memory_reserved(task.device) if on_card else 0
    return CaseResult(seconds=seconds, loaded=loaded - started, first=first, peak=peak, output=output)


def timed(run: Run) -> tuple[float, ...]:
    """Seconds of `RUNS` runs, or of fewer where they take long, but never below `FEW`."""
    seconds: list[float] = []
    while len(seconds) < FEW or (len(seconds) < RUNS and sum(seconds) < ENOUGH and max(seconds) < LONG):
        started = perf_counter()
        run()
        seconds.append(perf_counter() - started)
    return tuple(seconds)


def first_images(cases: Sequence[tuple[Runner, Task]], seconds: float) -> Iterator[CaseResult]:
    """From the start of a new process to its first image, twice, without making the random weights.

    `loaded` is what making them took.
    """
    for _, task in cases:
        try:
            runs = [_first_picture(task, seconds) for _ in range(2)]
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            yield CaseResult(problem=error_line(error))
            continue
        yield CaseResult(
            seconds=tuple(each for each, _ in runs), loaded=max(made for _, made in runs), first=runs[0][0]
        )


def _first_picture(task: Task, seconds: float) -> tuple[float, float]:
    """Seconds to the first image without making weights, and those of making them."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.first_image",
        task.model,
        task.device,
        task.dtype,
        str(task.size),
    ]
    started = perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    reply = json.loads(ended.stdout.splitlines()[-1])
    return reply["drawn"] - started - reply["made"], reply["made"]
