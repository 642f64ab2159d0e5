"""Work shared out over processes or a Ray cluster; who does it, in which order and how often changes nothing."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from fewstep.errors import InputError, MissingExtraError, unknown

EngineName = Literal["local", "ray"]
ENGINES: tuple[EngineName, ...] = ("local", "ray")
ATTEMPTS = 3
_SPAWN = mp.get_context("spawn")  # a fork would copy the locks of other threads


class ShardTask(Protocol):
    """A piece of work; it is done once the file `output` is there, which appears whole or not at all."""

    @property
    def output(self) -> Path:
        """The file that tells that the work is done."""


T = TypeVar("T", bound=ShardTask)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ShardExecutor:
    """Who works: `processes` of this machine (1: this very process), or the Ray cluster that RAY_ADDRESS names.

    `progress` is called with how many tasks are done and how many there are.
    """

    processes: int = 1
    engine: EngineName = "local"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(unknown("engine", self.engine, ENGINES))
        if self.processes < 1:
            raise InputError(f"processes is {self.processes}; at least 1 has to work")

    def run(self, work: Callable[[T], None], tasks: Sequence[T]) -> None:
        """Do `work` for each of `tasks` whose output is not there yet; both must be picklable.

        A process or machine that dies is replaced and its task done again, 3 times at most: then
        `ChildProcessError`. An error of `work` itself ends all at once; what was done stays.
        """
        left, lost = _pending(tasks), Counter[Path]()
        while left:
            done = len(tasks) - len(left)
            for count, trouble in enumerate(self._finished(work, left), 1):
                if trouble is not None:
                    raise trouble
                if self.progress:
                    self.progress(done + count, len(tasks))
            left = _pending(left)
            lost.update(task.output for task in left)
            if left and lost[left[0].output] >= ATTEMPTS:
                raise ChildProcessError(
                    f"the work for {left[0].output} was lost {ATTEMPTS} times: out of memory? Take fewer processes; "
                    "on a cluster, see that all machines reach the folder. The same command goes on where it was"
                    f"{f'; the input is {source}' if (source := getattr(left[0], 'source', None)) else ''}"
                )

    def _finished(self, work: Callable[[T], None], tasks: Sequence[T]) -> Iterator[Exception | None]:
        """None, or what went wrong, for each task that comes to an end; tasks may be lost on the way."""
        if self.engine == "ray":
            return _on_ray(work, tasks)
        if self.processes == 1:
            return (_attempt(work, task) for task in tasks)
        return _in_processes(work, tasks, min(self.processes, len(tasks)))


def _pending(tasks: Sequence[T]) -> list[T]:
    return [task for task in tasks if not task.output.exists()]


def _attempt(work: Callable[[T], None], task: T) -> Exception | None:
    try:
        work(task)
    except Exception as error:
        return error
    return None


@dataclass(kw_only=True)
class _Worker(Generic[T]):
    """A process at the other end of a pipe: when this one dies, it reads the end of the pipe and goes too."""

    process: Any
    pipe: Connection
    tasks: list[T] = field(default_factory=list)


def _started(work: Callable[[T], None]) -> _Worker[T]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process=process, pipe=ours)


def _serve(pipe: Connection, work: Callable[[T], None]) -> None:
    """Do the tasks that come through `pipe` until it ends."""
    try:
        while True:
            pipe.send(_attempt(work, pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)  # nobody is left to be told


def _in_processes(work: Callable[[T], None], tasks: Sequence[T], count: int) -> Iterator[Exception | None]:
    waiting = list(reversed(tasks))
    with _workers(work, count) as workers:
        for worker in workers:
            _dispatch(worker, waiting)
        while busy := [worker for worker in workers if worker.tasks]:
            ready = wait([worker.pipe for worker in busy])
            for worker in (worker for worker in busy if worker.pipe in ready):
                try:
                    outcome = worker.pipe.recv()
                except (EOFError, OSError):  # it died: its task is left for the next round
                    worker.process.join()
                    workers[workers.index(worker)] = worker = _started(work)
                else:
                    yield outcome
                _dispatch(worker, waiting)


def _dispatch(worker: _Worker[T], waiting: list[T]) -> None:
    worker.tasks = [waiting.pop()] if waiting else []
    with suppress(OSError):  # it is dead, which the end of its pipe will tell
        for task in worker.tasks:
            worker.pipe.send(task)


@contextmanager
def _workers(work: Callable[[T], None], count: int) -> Iterator[list[_Worker[T]]]:
    workers = [_started(work) for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
            worker.process.join()


def _on_ray(work: Callable[[T], None], tasks: Sequence[T]) -> Iterator[Exception | None]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError('the engine "ray" needs Ray: pip install "fewstep[ray]"') from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def attempt(row: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": pickle.dumps(_attempt(work, tasks[int(row["item"])]))}

    rows = ray.data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
    for row in rows.map(attempt).iter_rows():
        yield pickle.loads(row["outcome"])
