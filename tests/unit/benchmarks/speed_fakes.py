"""Runners of the speed benchmark that hang, fail or end: what a new process can import by name."""

from __future__ import annotations

import os
import time

from benchmarks.speed.tasks import Run, RunOutput, Task


def load(task: Task) -> Run:
    """By the task's model: "fails", "hangs", "dies", or else runs."""
    if task.model == "fails":
        raise RuntimeError("no such kernel")
    if task.model == "hangs":
        time.sleep(600)
    if task.model == "dies":
        os._exit(3)
    return lambda: RunOutput(None)
