"""How much memory can still be had, and errors that say so."""

from __future__ import annotations

import re
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Memory that can still be had, where the system tells it: of the machine, the container, and this process."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    limit, used = cgroup_numbers("memory.max"), cgroup_numbers("memory.current")
    free = min(free, limit[0] - used[0]) if limit and used else free
    allowed = _address_space()
    return free if allowed is None else max(0, min(free, allowed))


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not to be had: PyTorch raises a plain RuntimeError on a CPU."""
    message = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or "allocate memory" in message
        or ("mmap" in message and "cannot allocate" in message)
    )


def shortage(error: BaseException) -> str:
    """How many bytes were wanted and are free, for a message."""
    needed, free = re.search(r"(\d+) bytes", str(error)), free_bytes()
    wanted = f"{int(needed[1]):,} more bytes" if needed else "more bytes"
    return f"{wanted} of memory are needed at once and {'an unknown number' if free is None else f'{free:,}'} are free"


def cgroup_numbers(*files: str) -> tuple[int, ...] | None:
    """The numbers in files of the process's control group; None where there are none, or no limit."""
    try:
        words = " ".join((_CGROUP / file).read_text(encoding="ascii") for file in files).split()
        return tuple(int(word) for word in words)
    except (OSError, ValueError):
        return None


def _address_space() -> int | None:
    """Bytes that the process may still map (`ulimit -v`); None without a limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - pages * resource.getpagesize()
