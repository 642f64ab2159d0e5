"""The suites for CPUs: rows that are measured one after the other, each with a results file of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.options import BenchmarkOptions

EXPORTS = ("openvino", "onnx", "tensorrt", "single")
"""The folders in a model's folder in which peers keep what they had converted: gigabytes each."""

_CPU: tuple[dict[str, Any], ...] = (
    {"model": "sd-turbo", "part": "decode"},
    {"model": "sd-turbo", "part": "encode"},
    {"model": "sd-turbo", "part": "unet"},
    {"model": "sd-turbo", "part": "unet", "batch": 2},
    {"model": "sd-turbo", "part": "whole", "steps": 1},
    {"model": "sd-turbo", "part": "whole", "steps": 1, "decoder": "tiny"},
    {"model": "small-sd", "part": "unet"},
    {"model": "small-sd", "part": "unet", "batch": 2},
    {"model": "small-sd", "part": "whole", "steps": 10},
    {"model": "sd-v1-4", "part": "unet"},
    {"model": "sd-v1-4", "part": "unet", "batch": 2},
    {"model": "sdxl-base", "part": "unet"},
)
_WATERFALLS: tuple[dict[str, Any], ...] = (
    {"model": "sd-turbo", "part": "decode", "waterfall": True},
    {"model": "sd-turbo", "part": "unet", "waterfall": True},
    {"model": "sd-turbo", "part": "whole", "steps": 1, "waterfall": True},
)
SUITES = {"cpu": _CPU, "waterfall": _WATERFALLS}
"""The rows of each suite by what they ask for; rows of one model stand together."""


def suite_options(name: str, options: BenchmarkOptions) -> list[BenchmarkOptions]:
    """The rows of a suite, with all else as in `options`."""
    return [replace(options, **row) for row in SUITES[name]]


def run_suite(
    rows: Sequence[BenchmarkOptions], measure: Callable[[BenchmarkOptions], Path], *, resume: bool, keep: bool
) -> int:
    """Measure every row, say which are done, and return how many failed.

    `resume` leaves out those that have a file of today. Unless `keep`, what peers had converted of a model is removed
    after its last row.
    """
    failed = 0
    for index, row in enumerate(rows):
        log(f"[{index + 1}/{len(rows)}] {row.name}")
        if resume and row.place().is_file():
            log(f"  has a file of today: {row.place().name}")
        else:
            failed += not _done(row, measure)
        if not keep and all(row.model != later.model for later in rows[index + 1 :]):
            remove_exports(row.cache / f"random-{row.model}")
    log(f"{len(rows) - failed} of {len(rows)} rows are done")
    return failed


def remove_exports(folder: Path) -> None:
    """Remove what peers had converted of the model in `folder`; the model stays."""
    for name in EXPORTS:
        shutil.rmtree(folder / name, ignore_errors=True)


def log(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def _done(row: BenchmarkOptions, measure: Callable[[BenchmarkOptions], Path]) -> bool:
    try:
        log(f"  done: {measure(row)}")
    except (Exception, SystemExit) as error:  # the other rows are worth their hours
        log(f"  failed: {type(error).__name__}: {error}")
        return False
    return True
