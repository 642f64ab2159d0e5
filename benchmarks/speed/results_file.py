"""The results file of a suite for graphics cards, written after each row."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.speed.isolated import CaseResult
from benchmarks.speed.machine import hardware_name, threads_here
from benchmarks.speed.options import BenchmarkOptions
from benchmarks.speed.report import table
from benchmarks.speed.runners import Runner, version_of
from fewstep.evaluate.environment import source_commit
from fewstep.files import atomic_write

if TYPE_CHECKING:
    from benchmarks.speed.gpu_suite import Row

_HEADS = ("row", "runner", "median", "least to most", "runs", "must / aim", "reached")
_TAIL = ("load, s", "first run, s", "peak GB", "error")


class ResultLine(NamedTuple):
    """The result of one row with one runner."""

    row: Row
    runner: Runner
    measured: CaseResult


@dataclass(kw_only=True)
class ResultsFile:
    """The results so far; `absent`: the command that installs each runner that is not here.

    `about`: of a waterfall, what each of its lines adds.
    """

    path: Path
    title: str
    facts: str
    command: str
    about: Mapping[str, str]
    lines: list[ResultLine] = field(default_factory=list)
    absent: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(name: str, options: BenchmarkOptions, about: Mapping[str, str]) -> ResultsFile:
        """The empty results file of a suite."""
        hardware = options.hardware or hardware_name(options.device, options.threads or threads_here())
        return ResultsFile(
            path=options.results / f"speed_{name}-suite_{hardware}_{datetime.date.today()}.md",
            title=f"The suite {name} on {hardware}",
            facts=f"{_versions(options.device)}, commit {options.commit or source_commit()}, {datetime.date.today()}",
            command=options.command(name),
            about=about,
        )

    def add(self, row: Row, runner: Runner, measured: CaseResult) -> None:
        """Add a line and write the file."""
        self.lines.append(ResultLine(row, runner, measured))
        self.write()

    def write(self) -> None:
        """The file appears whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write(self.text().encode())

    def failures(self) -> int:
        """How many lines have no time."""
        return sum(line.measured.problem is not None for line in self.lines)

    def last(self) -> str:
        """The last line in short."""
        row, runner, measured = self.lines[-1]
        what = measured.problem or shown(row, measured.middle)
        target = "" if measured.problem or runner.peer else f" {reached(row, measured)}".rstrip()
        return f"{row.title()}, {runner.name}: {what}{target}"

    def text(self) -> str:
        """The whole file in markdown."""
        ratio = ("gives", "in all") if self.about else ("fewstep is faster by",)
        good = [line for line in self.lines if line.measured.problem is None]
        order = list(dict.fromkeys(line.row for line in good))
        good.sort(key=lambda line: order.index(line.row))
        rows = [[*_start(line), *self._ratios(line, good), *_end(line, good)] for line in good]
        notes = [f"- {row.title()}, {who.name}: not run. {it.problem}" for row, who, it in self.lines if it.problem]
        notes += [f"- {name}: not run, not installed; `{install}`" for name, install in self.absent.items()]
        notes += [f"- {name}: {what}" for name, what in self.about.items()]
        head = [f"# {self.title}", "", f"{self.facts}.", "", _METHOD, ""]
        tail = ["", *notes, *([""] * bool(notes)), f"Command: `{self.command}`", ""]
        return "\n".join([*head, *table((*_HEADS, *ratio, *_TAIL), rows), *tail])

    def _ratios(self, line: ResultLine, good: list[ResultLine]) -> list[str]:
        same = [each for each in good if each.row == line.row]
        if self.about:
            before = same[max(same.index(line) - 1, 0)]
            return [f"x {each.measured.middle / line.measured.middle:.2f}" for each in (before, same[0])]
        mine = next((each for each in same if each.runner.name == "fewstep"), line)
        return ["" if mine is line else f"x {line.measured.middle / mine.measured.middle:.2f}"]


_METHOD = (
    "Random weights of the real shapes, made on the device. A whole is `Pipeline.text_to_image`, a new prompt in, "
    "PIL images out, of batches with the next begun before one ends; a peer's is from ids to float images on "
    "the device. Medians of 20 runs, or of fewer (3 at least) where those take over 5 s or one takes over 1 s, "
    "after a first run, which compiles, chooses and records, and one more. Load: until the engine is there, making "
    "the weights included, in the process's first row of a model. First image: from the start of a process, "
    "imports included, without making the weights (their seconds are under load); what was compiled and chosen "
    "before lies on disk. Peak: what PyTorch holds of the card. Error: the largest difference from diffusers in "
    "float32, or else from another runner that is not fewstep's engine, as a share of the largest value."
)


def shown(row: Row, seconds: float) -> str:
    """A time in the row's unit."""
    value = in_unit(row, seconds)
    return (
        f"{value:,.0f} pictures/s"
        if row.unit == "pictures/s"
        else f"{value:.{3 if row.unit == 's' else 2}f} {row.unit}"
    )


def in_unit(row: Row, seconds: float) -> float:
    """Milliseconds, seconds, or images a second."""
    return row.batch / seconds if row.unit == "pictures/s" else seconds * {"ms": 1e3, "s": 1}[row.unit]


def reached(row: Row, measured: CaseResult) -> str:
    """The target that is reached, or the factor by which the first is missed."""
    if row.must is None or row.aim is None:
        return ""
    value, more = in_unit(row, measured.middle), row.unit == "pictures/s"
    if value >= row.aim if more else value <= row.aim:
        return "aim"
    short = row.must / value if more else value / row.must
    return "must" if short <= 1 else f"no, x {short:.2f}"


def _start(line: ResultLine) -> list[str]:
    row, runner, measured = line
    low, high = sorted((min(measured.seconds), max(measured.seconds)), key=lambda each: in_unit(row, each))
    return [
        row.title(),
        runner.name,
        shown(row, measured.middle),
        f"{shown(row, low)} to {shown(row, high)}",
        str(len(measured.seconds)),
        "" if runner.peer or row.must is None else f"{row.must:g} / {row.aim:g}",
        "" if runner.peer else reached(row, measured),
    ]


def _end(line: ResultLine, good: list[ResultLine]) -> list[str]:
    measured, peak = line.measured, line.measured.peak
    times = [f"{measured.loaded:.1f}", f"{measured.first:.1f}"]
    return [*times, f"{peak / 1e9:.2f}" if peak else "", _error(line, good)]


def _error(line: ResultLine, good: list[ResultLine]) -> str:
    """Beside the first of the row's outputs that is the oracle's, or else another's."""
    outputs = {each.runner.name: each.measured.output for each in good if each.row == line.row}
    order = ("diffusers, float32", "diffusers", "fewstep, plain engine")
    expected = next((outputs[name] for name in order if outputs.get(name) is not None), None)
    output = line.measured.output
    if output is None or expected is None or output is expected:
        return ""
    return f"{np.abs(output - expected).max() / np.abs(expected).max():.1e}"


def _versions(device: str) -> str:
    import torch

    words = [f"fewstep {version_of('fewstep')}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if not device.startswith("cuda"):
        return ", ".join(words)
    words = [torch.cuda.get_device_name(device), f"driver {_output('nvidia-smi', *_DRIVER)}", *words]
    words.append(f"cuDNN {torch.backends.cudnn.version()}")
    for package in ("triton", "diffusers"):
        try:
            words.append(f"{package} {version_of(package)}")
        except ImportError:
            words.append(f"no {package}")
    return ", ".join(words)


_DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _output(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
