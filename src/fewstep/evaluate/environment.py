"""What a measurement was made with: the hardware, the versions, and the commit of the source."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from fewstep import version

UNKNOWN = "unknown"


def machine() -> str:
    """One line with the device, the threads, the versions of PyTorch and fewstep, and the commit, for reports."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = torch.get_num_threads()
    versions = f"PyTorch {torch.__version__.split('+')[0]}, fewstep {version.__version__} (commit {source_commit()})"
    return f"{device}, {threads} thread{'s' * (threads > 1)}, {versions}"


def hardware(device: torch.device) -> str:
    """The name of the graphics card, or of the processor with its number of cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def processor() -> str:
    """The name of the processor, as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@cache
def source_commit(file: Path = Path(version.__file__)) -> str:
    """The short hash of the git commit that fewstep is imported from, with `+changes` for uncommitted changes.

    "unknown" for an installed package, even one that lies in a working tree of another project. Changes of
    `benchmarks/results` do not count: they are what measurements write.
    """
    if not _git(file.parent, "ls-files", file.name):
        return UNKNOWN
    commit = _git(file.parent, "rev-parse", "--short", "HEAD")
    if not commit:
        return UNKNOWN
    changes = _git(file.parent, "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{commit}+changes" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    """What a git command prints; nothing where it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
