"""Reads a file in a child process, and tells how that ended and what it cost."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, sleep

SECONDS = 1.0
"""Of processor time, which other work on the machine does not add to."""

BYTES = 64 << 20
"""Of memory, beyond what was there before."""

WALL = 60.0
"""Seconds after which a child has hung."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How reading ended: the error's kind and words, both empty where there was none; what it cost."""

    kind: str
    words: str
    seconds: float
    bytes: int


def attempt(read: Callable[[], object]) -> Outcome:
    """`read` in a forked child, which must end by itself."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        os.write(sender, json.dumps(_measured(read)).encode())
        os._exit(0)
    os.close(sender)
    _wait(child)
    with os.fdopen(receiver, "rb") as file:
        said = file.read()
    assert said, "the child died without a word: memory was damaged, or a limit was passed"
    return Outcome(**json.loads(said))


def assert_refused(outcome: Outcome) -> None:
    """Refused in our own words, on few lines that a terminal shows as they are, and cheaply."""
    assert outcome.kind in ("CheckpointError", "InputError"), f"{outcome.kind}: {outcome.words[:300]}"
    assert_cheap(outcome)
    assert all(line.isprintable() for line in outcome.words.split("\n")), repr(outcome.words)
    assert len(outcome.words) < 2000, outcome.words[:300]
    assert "weights_only" not in outcome.words


def assert_cheap(outcome: Outcome) -> None:
    assert outcome.seconds < SECONDS, f"{outcome.seconds:.1f} s of computing"
    assert outcome.bytes < BYTES, f"{outcome.bytes >> 20} MB of memory"


def _measured(read: Callable[[], object]) -> dict[str, object]:
    import torch

    torch.set_num_threads(1)  # the threads of OpenMP stayed with the parent
    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
    before = resource.getrusage(resource.RUSAGE_SELF)
    kind = words = ""
    try:
        read()
    except BaseException as error:
        kind, words = type(error).__name__, str(error)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "kind": kind,
        "words": words[:20_000],
        "seconds": seconds,
        "bytes": (after.ru_maxrss - before.ru_maxrss) * 1024,
    }


def _wait(child: int) -> None:
    started = perf_counter()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if perf_counter() - started > WALL:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("reading never ended")
        sleep(0.002)
