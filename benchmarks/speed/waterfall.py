"""The waterfall of fewstep's optimizations: the plain engine, on a CPU huge pages, then one optimization a row."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from benchmarks.speed import fewstep_runner
from benchmarks.speed.runners import SWITCHES, Runner
from fewstep.engines.cpu.optimizations import Optimizations
from fewstep.engines.cuda.optimizations import CudaOptimizations

FIRST_ROWS = {"plain engine": "Plain PyTorch.", "+ huge_pages": "Memory in pages of 2 MB."}


def optimizations_of(device: str) -> type[Optimizations | CudaOptimizations]:
    """The optimizations of the engine for a device."""
    return CudaOptimizations if device.startswith("cuda") else Optimizations


def names(device: str = "cpu") -> tuple[str, ...]:
    """All that can be left out, in the order in which it is added."""
    switches = () if device.startswith("cuda") else SWITCHES
    return (*switches, *(each.name for each in fields(optimizations_of(device))))


def rows(without: Sequence[str] = (), device: str = "cpu") -> list[Runner]:
    """The runners of a waterfall, each with all that those before it have; those `without` are left out."""
    pages = fewstep_runner.SMALL_PAGES if "huge_pages" in (*without, *_absent(device)) else fewstep_runner.HUGE_PAGES
    runners = [_row("plain engine", {"plain": True}, fewstep_runner.SMALL_PAGES)]
    if pages == fewstep_runner.HUGE_PAGES:
        runners.append(_row("+ huge_pages", {"plain": True}, pages))
    optimizations = {each.name: False for each in fields(optimizations_of(device))}
    for name in optimizations:
        if name not in without:
            optimizations[name] = True
            runners.append(_row(f"+ {name}", {"optimizations": dict(optimizations)}, pages))
    return runners


def _absent(device: str) -> set[str]:
    """Switches that do nothing there."""
    return set(SWITCHES) - set(names(device))


def descriptions(device: str = "cpu") -> dict[str, str]:
    """What the optimization of each row is: the line below its field."""
    (record,) = ast.parse(inspect.getsource(optimizations_of(device))).body
    assert isinstance(record, ast.ClassDef)
    lines = dict(FIRST_ROWS)
    for field, text in pairwise(record.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            lines[f"+ {ast.unparse(field.target)}"] = str(ast.literal_eval(text.value))
    return lines


def _row(name: str, options: dict[str, Any], environment: dict[str, str]) -> Runner:
    return Runner(
        name=name,
        load=fewstep_runner.load,
        packages=("fewstep", "torch"),
        options=options,
        environment=environment,
        peer=False,
    )
