"""The suites for graphics cards: rows with target times, those of one model in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from benchmarks.speed import waterfall
from benchmarks.speed.isolated import CaseResult, first_images, measure_isolated
from benchmarks.speed.machine import threads_here
from benchmarks.speed.models import noise_levels_of
from benchmarks.speed.options import BenchmarkOptions
from benchmarks.speed.results_file import ResultsFile
from benchmarks.speed.runners import CUDA, Runner, runners_named
from benchmarks.speed.sampling_loop import SAMPLERS
from benchmarks.speed.suite import log
from benchmarks.speed.tasks import NoiseLevels, Task
from fewstep.models.zoo import entry

FIRST = "first image"
"""The part of a row that is measured from the start of a process."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A task of a suite, with its target times in `unit`: "ms" or "s" a call, or "pictures/s".

    `steps`, `sampler`: None for the model's own.
    """

    model: str
    part: str = "whole"
    size: int = 512
    batch: int = 1
    steps: int | None = None
    sampler: str | None = None
    decoder: str = "kl"
    must: float | None = None
    aim: float | None = None
    unit: str = "ms"

    def task(self, options: BenchmarkOptions) -> Task:
        """The task on the device of `options`."""
        known = entry(self.model)
        assert known.defaults is not None
        steps, sampler = self.steps or known.defaults.steps, self.sampler or known.defaults.sampler
        dtype = options.dtype or ("float32" if options.device == "cpu" else "float16")
        kind = f"{dtype}-{options.device.partition(':')[0]}"
        return Task(
            model=self.model,
            folder=options.cache / f"random-{self.model}-{kind}",
            part="whole" if self.part == FIRST else self.part,
            size=self.size,
            batch=self.batch,
            threads=options.threads or threads_here(),
            device=options.device,
            dtype=dtype,
            steps=steps,
            guidance=known.defaults.guidance_scale,
            sampler=sampler,
            levels=noise_levels_of(self.model, steps, sampler) if sampler in SAMPLERS else NoiseLevels(),
            decoder=options.cache / f"random-taesd-{kind}" if self.decoder == "tiny" else None,
            made=True,
            images=True,
        )

    def title(self) -> str:
        """`sd-turbo, whole, 512 px, 1 step of euler, tiny decoder, batch 32`."""
        defaults = entry(self.model).defaults
        assert defaults is not None
        steps, words = self.steps or defaults.steps, [self.model, self.part, f"{self.size} px"]
        if self.part == "whole":
            words.append(f"{steps} step{'s' * (steps > 1)} of {self.sampler or defaults.sampler}")
            words += ["guided"] if defaults.guidance_scale > 1 else []
        words += ["tiny decoder"] if self.decoder == "tiny" else []
        words += [f"batch {self.batch}"] if self.batch > 1 else []
        return ", ".join(words)


_XL = Row(model="sdxl-base", size=1024)
_TURBO = Row(model="sd-turbo")
_SUITES: dict[str, tuple[Row, ...]] = {
    "cuda": (
        replace(_TURBO, must=8.5, aim=6.5),
        replace(_TURBO, decoder="tiny", must=4, aim=2.5),
        replace(_TURBO, part="unet"),
        replace(_TURBO, part="decode"),
        replace(_TURBO, decoder="tiny", batch=32, must=400, aim=600, unit="pictures/s"),
        replace(_TURBO, part=FIRST, must=6, aim=4, unit="s"),
        Row(model="sdxl-turbo", must=12, aim=9),
        Row(model="small-sd", steps=10, sampler="dpmpp_2m", must=42, aim=32),
        Row(model="sd-v1-4", must=280, aim=200),
        replace(_XL, must=1.45, aim=1.25, unit="s"),
        replace(_XL, part="unet", batch=2),
        replace(_XL, part="decode"),
    ),
    "cuda-peers": (replace(_TURBO, part="unet"), replace(_TURBO, part="decode")),
    "cuda-waterfall": (replace(_TURBO, must=8.5, aim=6.5),),
}
NAMES = tuple(_SUITES)


class Case(NamedTuple):
    """One row to be measured with one runner."""

    row: Row
    runner: Runner
    task: Task


Measure = Callable[[Sequence[tuple[Runner, Task]], float], Iterator[CaseResult]]


def run_card_suite(
    name: str,
    options: BenchmarkOptions,
    *,
    isolated: Measure = measure_isolated,
    first: Measure = first_images,
) -> int:
    """Measure a suite and write its results file after each row; the number of failed rows.

    `isolated` and `first` measure the jobs of one process, and first images.
    """
    batches = cases(name, options)
    done, of = 0, sum(map(len, batches))
    results = ResultsFile.of(name, options, waterfall.descriptions(options.device) if _is_waterfall(name) else {})
    results.absent = {each.name: install for each in runners_of(name, options) if (install := each.missing())}
    results.write()
    for batch in batches:
        measure = first if batch[0].row.part == FIRST else isolated
        pairs = [(case.runner, case.task) for case in batch]
        for case, measured in zip(batch, measure(pairs, options.peer_seconds), strict=True):
            done += 1
            results.add(case.row, case.runner, measured)
            log(f"[{done}/{of}] {results.last()}")
    log(f"{results.path}")
    return results.failures()


def cases(name: str, options: BenchmarkOptions) -> list[list[Case]]:
    """The cases of a suite; each list is measured in one process: one model's rows with one runner, or a waterfall."""
    here = [each for each in runners_of(name, options) if not each.missing()]
    batches = []
    for (_, first), group in groupby(_SUITES[name], key=lambda row: (row.model, row.part == FIRST)):
        rows = list(group)
        pairs = [(row, each) for each in here for row in rows if _suits(row, each, first=first)]
        parts = [list(some) for _, some in groupby(pairs, key=lambda pair: _is_waterfall(name) or pair[1].name)]
        batches += [[Case(row, each, row.task(options)) for row, each in part] for part in parts]
    return batches


def runners_of(name: str, options: BenchmarkOptions) -> list[Runner]:
    """The runners of a suite: those of the waterfall, or the peers of `options`."""
    if _is_waterfall(name):
        return waterfall.rows(options.without, options.device)
    return runners_named(options.peers, CUDA)


def _suits(row: Row, runner: Runner, *, first: bool) -> bool:
    if runner.peer and row.part == "whole":  # by the loop that peers share: see sampling_loop.py
        known = entry(row.model)
        assert known.defaults is not None
        return len(known.texts) == 1 and (row.sampler or known.defaults.sampler) in SAMPLERS
    return not first or runner.name == "fewstep"


def _is_waterfall(name: str) -> bool:
    return name.endswith("waterfall")
