"""The log of a training run: JSON lines, a progress bar, and TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewstep.errors import MissingExtraError
from fewstep.files import atomic_write
from fewstep.train.plan import Plan

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("[progress.description]{task.description}", "{task.fields[summary]}")


class MetricsLogger:
    """Writes a line of `log.jsonl` every `plan.log_steps` steps and draws a bar; nothing unless `on`.

    `waited_seconds`: seconds spent waiting for data since the run began.
    """

    def __init__(self, plan: Plan, *, on: bool, waited_seconds: Callable[[], float]) -> None:
        self.plan, self.on, self.waited_seconds = plan, on, waited_seconds
        self.skipped, self.begun = 0, 0  # steps left out; the step that this run goes on from
        self.last: tuple[int, float, float] | None = None  # step, seconds and waiting at the last line
        title, summary = (TextColumn(column) for column in COLUMNS)
        self.bar = Progress(title, BarColumn(), summary, TimeElapsedColumn(), TimeRemainingColumn(), disable=not on)
        self.log = plan.folder / "log.jsonl"
        self.task = self.bar.add_task(plan.folder.name, total=1.0, summary="")
        self.tensorboard = TensorBoardWriter(plan.folder) if on and plan.tensorboard else None

    def wants(self, step: int) -> bool:
        """Whether a line is written for the step that ends at `step`."""
        return self.on and step % self.plan.log_steps == 0

    def write(self, step: int, seconds: float, numbers: Mapping[str, float]) -> None:
        """Move the bar to where the run is, and write a line where one is due."""
        self.bar.update(self.task, completed=self.plan.progress(step, seconds))
        if not self.wants(step):
            return
        if self.last is None:
            self._drop_later_lines()
        numbers = {"step": step, "seconds": seconds, **numbers, **self._speed(step, seconds), "skipped": self.skipped}
        line = {name: round(value, 6) if isfinite(value) else None for name, value in numbers.items()}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            self.tensorboard.write(step, numbers)
        shown = [f"{name} {numbers[name]:.4g}" for name in numbers if name.endswith(("loss", "images/s", "data wait"))]
        self.bar.update(self.task, summary="  ".join(shown))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar on the screen, until the context ends."""
        with self.bar:
            yield

    def _drop_later_lines(self) -> None:
        """Remove the lines of steps that are computed again, after a kill or from the start, and truncated lines."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        stay = [line for line in lines if _step_of(line) <= self.begun]
        if stay != lines:
            with atomic_write(self.log) as whole:
                whole.write("".join(f"{line}\n" for line in stay).encode())

    def _speed(self, step: int, seconds: float) -> dict[str, float]:
        """Pictures a second and the share of time without data, since the last line."""
        waited_seconds, last = self.waited_seconds(), self.last
        self.last = (step, seconds, waited_seconds)
        if last is None or seconds <= last[1]:
            return {}
        passed = seconds - last[1]
        return {
            "images/s": self.plan.batch_size * (step - last[0]) / passed,
            "data wait": (waited_seconds - last[2]) / passed,
        }


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for one that is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return inf


class TensorBoardWriter:
    """Event files in `folder`, for `tensorboard --logdir`. Raises `MissingExtraError` where TensorBoard is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError('plan.tensorboard needs TensorBoard: pip install "fewstep[train]"') from error
        self._open = partial(SummaryWriter, str(folder))
        self._writer: SummaryWriter | None = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """A point on the curve of each number; points that a killed run wrote from this step on are purged."""
        if self._writer is None:
            self._writer = self._open(purge_step=step)
        for name, value in numbers.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
