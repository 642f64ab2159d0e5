"""A progress bar on stderr, shown on terminals only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

    from fewstep.pipeline.request import Progress


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line that says what is being done and how far it is."""

    bars: rich.progress.Progress
    task: rich.progress.TaskID

    def stage(self, name: str) -> None:
        """Say `name`, of a stage whose length is not known."""
        self.bars.update(self.task, description=name, total=None)

    def on_step(self, progress: Progress) -> None:
        """Show that step `progress.index` (from 0) of `progress.total` is done."""
        self.bars.update(self.task, description="generating", total=progress.total, completed=progress.index + 1)


@contextmanager
def bar(*, shown: bool) -> Iterator[Bar]:
    """A bar that goes away when the block ends; invisible unless `shown` and stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden, refresh_per_second=5) as bars:
        yield Bar(bars=bars, task=bars.add_task("", total=None))
