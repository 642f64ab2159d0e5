"""The suite for a card: the rows of the table of targets, the rows of one model in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from benchmarks.speed import waterfall
from benchmarks.speed.alone import Measured, first_pictures, measured_alone
from benchmarks.speed.contenders import CUDA, Contender, named
from benchmarks.speed.machine import threads_here
from benchmarks.speed.models import walk_of
from benchmarks.speed.request import Request
from benchmarks.speed.sheet import Sheet
from benchmarks.speed.suite import say
from benchmarks.speed.tasks import Task, Walk
from benchmarks.speed.walk import SAMPLERS
from fewstep.models.zoo import entry

FIRST = "first picture"
"""The part of a row that is measured from the start of a process."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured, and its targets in `unit`: "ms" or "s" a call, or "pictures/s".

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

    def task(self, request: Request) -> Task:
        """The task on the request's device."""
        known = entry(self.model)
        assert known.defaults is not None
        steps, sampler = self.steps or known.defaults.steps, self.sampler or known.defaults.sampler
        dtype = request.dtype or ("float32" if request.device == "cpu" else "float16")
        kind = f"{dtype}-{request.device.partition(':')[0]}"
        return Task(
            model=self.model,
            folder=request.cache / f"random-{self.model}-{kind}",
            part="whole" if self.part == FIRST else self.part,
            size=self.size,
            batch=self.batch,
            threads=request.threads or threads_here(),
            device=request.device,
            dtype=dtype,
            steps=steps,
            guidance=known.defaults.guidance_scale,
            sampler=sampler,
            walk=walk_of(self.model, steps, sampler) if sampler in SAMPLERS else Walk(),
            decoder=request.cache / f"random-taesd-{kind}" if self.decoder == "tiny" else None,
            made=True,
            pictures=True,
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


class Job(NamedTuple):
    """A row for a contender."""

    row: Row
    contender: Contender
    task: Task


Measure = Callable[[Sequence[tuple[Contender, Task]], float], Iterator[Measured]]


def run_card_suite(
    name: str, request: Request, commit: str, *, alone: Measure = measured_alone, first: Measure = first_pictures
) -> int:
    """Measure a suite; its file is written anew after each row. How many rows have failed.

    `alone` and `first` measure the jobs of one process, and first pictures.
    """
    batches = jobs(name, request)
    done, of = 0, sum(map(len, batches))
    sheet = Sheet.of(name, request, commit, waterfall.descriptions(request.device) if _is_waterfall(name) else {})
    sheet.absent = {each.name: install for each in wanted(name, request) if (install := each.missing())}
    sheet.write()
    for batch in batches:
        measure = first if batch[0].row.part == FIRST else alone
        pairs = [(job.contender, job.task) for job in batch]
        for job, measured in zip(batch, measure(pairs, request.peer_seconds), strict=True):
            done += 1
            sheet.add(job.row, job.contender, measured)
            say(f"[{done}/{of}] {sheet.last()}")
    say(f"{sheet.path}")
    return sheet.failures()


def jobs(name: str, request: Request) -> list[list[Job]]:
    """What is measured, each list in one process: a model's rows for one contender, or a whole waterfall."""
    here = [each for each in wanted(name, request) if not each.missing()]
    found = []
    for (_, first), group in groupby(_SUITES[name], key=lambda row: (row.model, row.part == FIRST)):
        rows = list(group)
        pairs = [(row, each) for each in here for row in rows if _suits(row, each, first=first)]
        batches = [list(some) for _, some in groupby(pairs, key=lambda pair: _is_waterfall(name) or pair[1].name)]
        found += [[Job(row, each, row.task(request)) for row, each in batch] for batch in batches]
    return found


def wanted(name: str, request: Request) -> list[Contender]:
    """The contenders of a suite: the waterfall's, or those asked for."""
    if _is_waterfall(name):
        return waterfall.rows(request.without, request.device)
    return named(request.peers, CUDA)


def _suits(row: Row, contender: Contender, *, first: bool) -> bool:
    if contender.peer and row.part == "whole":  # by the loop that peers share: see walk.py
        known = entry(row.model)
        assert known.defaults is not None
        return len(known.texts) == 1 and (row.sampler or known.defaults.sampler) in SAMPLERS
    return not first or contender.name == "fewstep"


def _is_waterfall(name: str) -> bool:
    return name.endswith("waterfall")
