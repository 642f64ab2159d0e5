"""Measurement of runners by turns, each turn in a new process."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.speed.runners import Runner
from benchmarks.speed.tasks import Run, Task

GIVE_UP = 3600.0
"""Seconds to wait for a runner."""


class Measurement(NamedTuple):
    """One run: its seconds, those of its stages, the peak memory, the output, and the seconds of loading."""

    seconds: float
    stages: Mapping[str, float]
    peak_bytes: int
    output: Any
    loaded: float


@dataclass(frozen=True, kw_only=True)
class RunnerResult:
    """All measurements of a runner, or the `problem` that ended it.

    `first`: seconds from the start of its process to the first output, one a turn; `loaded` likewise of loading.
    `seconds`: of each run that counts; `stages`: the same by stage.
    """

    runner: Runner
    first: tuple[float, ...] = ()
    loaded: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    stages: tuple[Mapping[str, float], ...] = ()
    peak: int = 0
    output: Any = None
    problem: str | None = None

    @property
    def middle(self) -> float:
        """The median of its runs."""
        return median(self.seconds)

    def stage(self, name: str) -> float | None:
        """The median of a stage, None where it was not measured."""
        taken = [each[name] for each in self.stages if name in each]
        return median(taken) if taken else None

    def begun(self, first: float, answer: Measurement) -> RunnerResult:
        """The result with the first output of a turn added."""
        peak = max(self.peak, answer.peak_bytes)
        return replace(self, first=(*self.first, first), loaded=(*self.loaded, answer.loaded), peak=peak)

    def ran(self, answer: Measurement) -> RunnerResult:
        """The result with one more run added."""
        return replace(
            self,
            seconds=(*self.seconds, answer.seconds),
            stages=(*self.stages, answer.stages),
            peak=max(self.peak, answer.peak_bytes),
            output=answer.output,
        )


def measured(runners: Sequence[Runner], task: Task, runs: int, turns: int) -> list[RunnerResult]:
    """Every runner on the task: `runs` that count, in `turns`, one after the other within a turn."""
    results = {each.name: RunnerResult(runner=each, problem=prepared(each, task)) for each in runners}
    for count in shares(runs, turns):
        for each in runners:
            if results[each.name].problem is None:
                print(f"  {each.name} ...", file=sys.stderr, flush=True)
                results[each.name] = _turn(results[each.name], task, count)
    return list(results.values())


def shares(runs: int, turns: int) -> list[int]:
    """`runs` in at most `turns` parts, as even as can be, the larger ones first."""
    turns = min(runs, turns)
    return [runs // turns + (turn < runs % turns) for turn in range(turns)]


def _turn(results: RunnerResult, task: Task, count: int) -> RunnerResult:
    """One process: a first run, and `count` that count."""
    started = perf_counter()
    with process(serve, results.runner, task, environment=results.runner.environment) as line:
        answer = _answer(line)
        if isinstance(answer, str):
            return replace(results, problem=answer)
        results = results.begun(perf_counter() - started, answer)
        for _ in range(count):
            line.send(True)
            answer = _answer(line)
            if isinstance(answer, str):
                return replace(results, problem=answer)
            results = results.ran(answer)
    return results


@contextmanager
def process(
    target: Callable[..., None], *given: Any, environment: Mapping[str, str], patience: float = 60
) -> Iterator[Connection]:
    """The line to a new process that calls `target(*given, line)`.

    It ends with the block: after `patience` seconds by force, with all processes that it has started.
    """
    context = mp.get_context("spawn")
    parent_end, child_end = context.Pipe()
    child = context.Process(target=_lead_group, args=(target, *given, child_end), daemon=True)
    with _environment(environment):
        child.start()
    child_end.close()  # so that the end of the process is the end of the line
    assert child.pid is not None
    try:
        yield parent_end
    except BaseException:
        patience = 0
        raise
    finally:
        parent_end.close()
        child.join(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()


def _lead_group(target: Callable[..., None], *given: Any) -> None:
    """`target` in a process that leads a group of its own, so that compilers it has started can be ended with it."""
    os.setpgid(0, 0)
    _end_first()
    target(*given)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """With variables that a process started inside has from its beginning: PyTorch reads some only once."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _answer(line: Connection) -> Measurement | str:
    return answer(line, GIVE_UP)  # type: ignore[no-any-return]


def answer(line: Connection, seconds: float) -> Any:
    """The next message of `line`, or in words why none came."""
    if not line.poll(seconds):
        return f"no answer in {seconds:g} s: ended"
    try:
        return line.recv()
    except (EOFError, ConnectionResetError):
        return "its process ended (out of memory?)"


def prepared(runner: Runner, task: Task, seconds: float = GIVE_UP) -> str | None:
    """Have the runner write its files; what went wrong, if something did."""
    if runner.prepare is None or runner.missing():
        return None
    if task.made:
        from benchmarks.speed.models import random_model

        random_model(task)
    with process(prepare, runner, task, environment={}) as line:
        return answer(line, seconds)  # type: ignore[no-any-return]


def prepare(runner: Runner, task: Task, line: Connection) -> None:
    """Write the runner's files and say what went wrong, or nothing."""
    assert runner.prepare is not None
    try:
        runner.prepare(task)
    except Exception as error:  # whatever a peer raises is a row of the table
        line.send(error_line(error))
    else:
        line.send(None)


def serve(runner: Runner, task: Task, line: Connection) -> None:
    """Load and run once, then once for each message until the line closes; send the measurement of each run."""
    try:
        memory = Memory(task.device)
        started = perf_counter()
        run = runner.load(task, **runner.options)
        loaded = perf_counter() - started
        while True:
            line.send(_run(run, memory, loaded))
            line.recv()
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:  # whatever a peer raises is a row of the table
        line.send(error_line(error))


def _run(run: Run, memory: Memory, loaded: float) -> Measurement:
    started = perf_counter()
    made = run()
    seconds, output = perf_counter() - started, made.output
    if hasattr(output, "cpu"):
        output = output.float().cpu().numpy()
    return Measurement(seconds, made.stages, memory.peak(), output, loaded)


def _end_first() -> None:
    """Where memory runs out, Linux shall end this process, and not the one that keeps the results."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def error_line(error: Exception) -> str:
    """In one line of at most about 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


class Memory:
    """Memory of this process: the largest resident memory, or on CUDA what it has taken of the card's."""

    def __init__(self, device: str) -> None:
        self.device = device if device.startswith("cuda") else None
        self.before = self._free() if self.device else 0

    def peak(self) -> int:
        """In bytes."""
        return self.before - self._free() if self.device else _resident_peak()

    def _free(self) -> int:
        import torch

        return torch.cuda.mem_get_info(self.device)[0]


def _resident_peak() -> int:
    """Linux's own mark of this program; the usual one also holds what the parent had when it started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
