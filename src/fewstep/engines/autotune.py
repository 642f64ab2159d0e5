"""Autotuning: the fastest of several implementations on this machine, measured once and cached in a file."""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from fewstep.engines.folder import cache_folder
from fewstep.files import write_json
from fewstep.locks import made_once
from fewstep.memory import is_short_of_memory

_log = logging.getLogger(__name__)

LONG = 2.0
"""Seconds for one run of all candidates above which there is no second run."""

LARGEST_FILE = 1 << 20
"""Bytes of a cache file: some thousand keys."""

Candidates = dict[str, Callable[[], Tensor]]


class Clock(Protocol):
    """Measures how long a device takes for one call of a function."""

    def ready(self) -> bool:
        """Whether anything can be measured now: not while a CUDA graph is captured."""

    def seconds(self, candidate: Callable[[], object]) -> float:
        """Seconds of one call of `candidate`. What `candidate` raises passes through."""


class HostClock:
    """Wall-clock time of one call, for devices that have computed when a call returns."""

    def ready(self) -> bool:
        """See `Clock`."""
        return True

    def seconds(self, candidate: Callable[[], object]) -> float:
        """See `Clock`."""
        started = perf_counter()
        candidate()
        return perf_counter() - started


class Autotuner:
    """Runs the fastest candidate for each key; results are cached in `path` between processes if it can be written.

    A new key costs a measurement of each candidate by `clock`. All candidates must compute the same, so a wrong choice
    costs only time. A candidate that raises is excluded, and so is, with a `tolerance`, one whose result differs from
    the first's by more than this relative error. The first candidate is the fallback: it runs, and is not stored, while
    the clock is not ready, and where all candidates raise (so the error is its own). Threads measure one after the
    other, and a choice stays for the process: what is drawn at the same time is drawn by the same implementations.
    """

    def __init__(self, path: Path | None = None, clock: Clock | None = None, *, tolerance: float | None = None) -> None:
        self.path, self.clock, self.tolerance = path, clock or HostClock(), tolerance
        self.known: dict[str, str] = _read(path)
        self._temporary: set[str] = set()  # keys whose measurement ran short of memory: not written to the file
        self._lock = threading.RLock()  # a candidate may itself call the autotuner

    def run(self, key: str, candidates: Candidates) -> Tensor:
        """The result of the fastest of `candidates`."""
        if len(candidates) == 1:
            return next(iter(candidates.values()))()
        chosen = self.known.get(key, "")
        if chosen not in candidates:
            chosen = self._fastest_of(key, candidates)
        return candidates[chosen]()

    def _fastest_of(self, key: str, candidates: Candidates) -> str:
        """The name of the fastest of `candidates`, stored for the next time."""
        if not self.clock.ready():
            return next(iter(candidates))
        with self._lock:
            chosen = self.known.get(key, "")
            if chosen in candidates:
                return chosen
            seconds = self._measured(key, candidates)
            if not seconds:
                return next(iter(candidates))
            self.known[key] = chosen = min(seconds, key=lambda name: seconds[name])
            self._write()
            return chosen

    def _measured(self, key: str, candidates: Candidates) -> dict[str, float]:
        """Seconds of those of `candidates` that can be used, the better of two runs where these are short."""
        seconds: dict[str, float] = {}
        for name, candidate in self._agreeing(key, candidates).items():
            with self._excluding_failures(key, name):
                seconds[name] = self.clock.seconds(candidate)
        if sum(seconds.values()) < LONG:  # the first run may have had to wait for memory
            for name in list(seconds):
                before = seconds.pop(name)
                with self._excluding_failures(key, name):
                    seconds[name] = min(before, self.clock.seconds(candidates[name]))
        return seconds

    def _agreeing(self, key: str, candidates: Candidates) -> Candidates:
        """Those of `candidates` that compute what the first one does, where that is to be checked."""
        if self.tolerance is None:
            return candidates
        wanted, agreeing = None, {}
        for name, candidate in candidates.items():
            with self._excluding_failures(key, name):
                found = candidate()
                wanted = found if wanted is None else wanted
                if not _close(found, wanted, self.tolerance):
                    raise ArithmeticError("its result is another one")
                agreeing[name] = candidate
        return agreeing

    @contextmanager
    def _excluding_failures(self, key: str, name: str) -> Iterator[None]:
        """Exclude a candidate that raises, for whatever reason; a debug message says so."""
        try:
            yield
        except Exception as error:  # a compiler's, a library's that does not take the shape, short memory
            _log.debug("%s: candidate %r is excluded: %s", key, name, error)
            if isinstance(error, torch.OutOfMemoryError) or is_short_of_memory(error):
                self._temporary.add(key)

    def _write(self) -> None:
        """Keep what is known; a disk that cannot be written is no reason to stop."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.known = {**_read(self.path), **self.known}  # what another process has found out stays
            write_json(
                self.path, {key: candidate for key, candidate in self.known.items() if key not in self._temporary}
            )
        except (OSError, ValueError):  # half a character in a key of another hand
            self.path = None


@made_once
def cpu_autotuner(threads: int) -> Autotuner:
    """Those of this processor, number of threads and version of PyTorch."""
    machine = (platform.processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__, processor())
    return Autotuner(cache_file(f"cpu-{digest(*machine, threads)}.json"))


def cache_file(name: str) -> Path | None:
    """Path of a cache file; None without a folder of the user's own."""
    folder = cache_folder()
    return None if folder is None else folder / name


def digest(*what: object) -> str:
    """A short hash of what the measurements depend on."""
    return blake2b(repr(what).encode(), digest_size=6).hexdigest()


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether two results are the same but for a part `tolerance`; what is not finite cannot be compared."""
    if found.shape != wanted.shape:
        return False
    size, error = (float(torch.linalg.vector_norm(each, dtype=torch.float32)) for each in (wanted, found - wanted))
    return not isfinite(size) or error <= tolerance * size


def _read(path: Path | None) -> dict[str, str]:
    """What the file says; nothing for one that is damaged, too large, or no file: it is made anew."""
    try:
        if path is None or not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    usable = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if usable else {}
