"""`fewstep bench`: how fast a model draws on this machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli import options, progress
from fewstep.cli.settings import Settings, complete_settings, task_keywords

if TYPE_CHECKING:
    import torch

    from fewstep import Pipeline, Result

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "purple")


def bench(
    *,
    model: options.Model = None,
    steps: options.Steps = None,
    size: options.Size = None,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Pictures that count, after a first one.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU (else those that the engine takes).")] = None,
    decoder: options.Decoder = None,
    device: options.Device = None,
    dtype: options.DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure how long a model takes to load and to draw on this machine."""
    asked = {"prompt": prompt(0), "steps": steps, "size": size}
    wanted = task_keywords(complete_settings({name: value for name, value in asked.items() if value is not None}))
    with progress.bar(shown=not as_json) as bar:
        bar.stage("loading")
        began = perf_counter()
        pipe = _loaded(model, threads, device=device, dtype=dtype, decoder=decoder)
        loading = perf_counter() - began
        bar.stage("drawing")
        first = _drawn(pipe, wanted, 0)
        opening = perf_counter() - began
        warm = _warm(pipe, wanted, runs)
    found = {
        **machine(pipe),
        **_task(pipe, first),
        "load_seconds": loading,
        "first_picture_seconds": opening,
        **warm,
        "peak_memory_bytes": peak_memory(),
    }
    typer.echo(json.dumps(found, indent=2) if as_json else table(found))


def prompt(number: int) -> str:
    """Another text for each number: what an engine remembers of a text is no speed of drawing."""
    count = len(COLOURS)
    top, bottom = COLOURS[number % count], COLOURS[number // count % count]
    return f"a {top} cube on top of a {bottom} sphere" if number < count**2 else f"{number} {top} cubes"


def machine(pipe: Pipeline) -> dict[str, Any]:
    """What it runs on."""
    import torch

    from fewstep import __version__

    return {
        "fewstep": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware(pipe.engine.device),
        "device": str(pipe.engine.device),
        "threads": getattr(pipe.engine, "threads", torch.get_num_threads()),
        "engine": type(pipe.engine).__name__,
    }


def hardware(device: torch.device) -> str:
    """The name of the card, or of the processor with its number of cores."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    told = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{told or platform.processor() or platform.machine()}, {cores} cores"


def peak_memory() -> int | None:
    """The most memory that this process has had, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(found: Mapping[str, Any]) -> str:
    """What was found, for people."""
    spread = f"{found['fastest_seconds']:.3f} to {found['slowest_seconds']:.3f} in {found['runs']} runs"
    stages = (f"{name} {seconds:.3f}" for name, seconds in found["stage_seconds"].items() if seconds > 0)
    memory, steps = found["peak_memory_bytes"], found["steps"]
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    rows = {
        "model": f"{found['model']}, {found['width']}x{found['height']}, {steps} step{'s' * (steps > 1)}",
        "machine": f"{found['hardware']}, {found['device']}, {found['dtype']}, {threads}",
        "versions": f"fewstep {found['fewstep']}, torch {found['torch']}, Python {found['python']}",
        "to load": f"{found['load_seconds']:.2f} s",
        "first picture": f"{found['first_picture_seconds']:.2f} s, loading included",
        "next pictures": f"{found['picture_seconds']:.3f} s ({spread})",
        "stages": f"{', '.join(stages)} s",
        "peak memory": "unknown" if memory is None else f"{memory / 1e9:.2f} GB",
    }
    return "\n".join(f"{name:15}{text}" for name, text in rows.items())


def _loaded(model: str | None, threads: int | None, **how: Any) -> Pipeline:
    import torch

    import fewstep

    if threads is not None:
        torch.set_num_threads(threads)
    return fewstep.load(model, **how)


def _warm(pipe: Pipeline, wanted: Settings, runs: int) -> dict[str, Any]:
    """The seconds of `runs` pictures, and of their stages."""
    seconds: list[float] = []
    results: list[Result] = []
    for number in range(1, runs + 1):
        started = perf_counter()
        results.append(_drawn(pipe, wanted, number))
        seconds.append(perf_counter() - started)
    stages = {name: [each.seconds[name] for each in results if name in each.seconds] for name in results[-1].seconds}
    return {
        "runs": runs,
        "picture_seconds": median(seconds),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "stage_seconds": {name: median(each) for name, each in stages.items()},
    }


def _drawn(pipe: Pipeline, wanted: Settings, number: int) -> Result:
    return pipe.text_to_image(**{**wanted, "prompt": prompt(number), "seed": number})


def _task(pipe: Pipeline, first: Result) -> dict[str, Any]:
    settings = first.settings
    told = {name: settings[name] for name in ("width", "height", "steps", "guidance_scale", "sampler")}
    return {"model": pipe.parts.name, "dtype": str(pipe.parts.unet.conv_in.weight.dtype).removeprefix("torch."), **told}
