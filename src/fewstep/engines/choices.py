"""Which of several ways to compute a thing is the fastest on this machine: measured once, and remembered."""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from fewstep.engines.folder import cache_folder
from fewstep.files import write_json
from fewstep.locks import made_once

LONG = 2.0
"""Seconds of one run of all ways above which a second run is left out."""

LARGEST_FILE = 1 << 20
"""Bytes of kept choices: some thousand keys."""

Ways = dict[str, Callable[[], Tensor]]


class Choices:
    """The fastest way for each key, kept in `path` between processes where that can be written.

    A key that is new costs a run of each way. All ways must compute the same, so a wrong choice costs time alone.
    `wait` comes back when the device has done all that it was told. Threads measure one after the other, and a choice
    that was made stays: what is drawn at the same time is drawn in the same ways.
    """

    def __init__(self, path: Path | None = None, wait: Callable[[], object] = lambda: None) -> None:
        self.path, self.wait = path, wait
        self.known: dict[str, str] = _read(path)
        self._lock = threading.RLock()  # a way may have choices of its own

    def run(self, key: str, ways: Ways) -> Tensor:
        """What the fastest of `ways` computes."""
        if len(ways) == 1:
            return next(iter(ways.values()))()
        chosen = self.known.get(key, "")
        if chosen not in ways:
            with self._lock:
                chosen = self.known.get(key, "")
                if chosen not in ways:
                    chosen = self._measured(ways)
                    self.known[key] = chosen
                    self._write()
        return ways[chosen]()

    def _measured(self, ways: Ways) -> str:
        """The fastest of `ways` now."""
        seconds = {name: self._timed(way) for name, way in ways.items()}
        if sum(seconds.values()) < LONG:  # the first run may have had to wait for memory
            seconds = {name: min(before, self._timed(ways[name])) for name, before in seconds.items()}
        return min(seconds, key=lambda name: seconds[name])

    def _timed(self, way: Callable[[], Tensor]) -> float:
        self.wait()
        started = perf_counter()
        way()
        self.wait()
        return perf_counter() - started

    def _write(self) -> None:
        """Keep what is known; a disk that cannot be written is no reason to stop."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.known = {**_read(self.path), **self.known}  # what another process has found out stays
            write_json(self.path, self.known)
        except (OSError, ValueError):  # half a character in a key of another hand
            self.path = None


@made_once
def of_this_machine(threads: int) -> Choices:
    """Those of this processor, number of threads and version of PyTorch."""
    machine = (platform.processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__, processor())
    return Choices(kept_file(f"cpu-{digest(*machine, threads)}.json"))


def kept_file(name: str) -> Path | None:
    """Where choices are kept between processes; None without a folder of the user's own."""
    folder = cache_folder()
    return None if folder is None else folder / name


def digest(*what: object) -> str:
    """A short name for what choices depend on."""
    return blake2b(repr(what).encode(), digest_size=6).hexdigest()


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _read(path: Path | None) -> dict[str, str]:
    """What the file says; nothing for one that is damaged, too large, or no file: it is made anew."""
    try:
        if path is None or not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kept = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if kept else {}
