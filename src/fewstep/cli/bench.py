"""`fewstep bench`: how fast a model generates images on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli import options, progress
from fewstep.cli.settings import complete_settings, task_keywords

if TYPE_CHECKING:
    from fewstep import Pipeline


def bench(
    *,
    model: options.Model = None,
    steps: options.Steps = None,
    size: options.Size = None,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Images that count, after a first one.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU (else those that the engine takes).")] = None,
    decoder: options.Decoder = None,
    device: options.Device = None,
    dtype: options.DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure how long a model takes to load and to generate images on this machine."""
    given = {"prompt": "", "steps": steps, "size": size}
    settings = task_keywords(complete_settings({name: value for name, value in given.items() if value is not None}))
    with progress.bar(shown=not as_json) as bar:
        bar.stage("loading")
        began = perf_counter()
        pipe = _load(model, threads, device=device, dtype=dtype, decoder=decoder)
        load_seconds = perf_counter() - began

        from fewstep.evaluate import environment, speed

        bar.stage("generating")
        first = speed.image_of(pipe, settings, 0)
        first_seconds = perf_counter() - began
        times = speed.measure(pipe, settings, runs)
    results = {
        **speed.describe_run(pipe, first),
        "load_seconds": load_seconds,
        "first_picture_seconds": first_seconds,
        **times,
        "peak_memory_bytes": environment.peak_memory(),
    }
    typer.echo(json.dumps(results, indent=2) if as_json else table(results))


def table(results: Mapping[str, Any]) -> str:
    """The results in two columns, for people."""
    spread = f"{results['fastest_seconds']:.3f} to {results['slowest_seconds']:.3f} in {results['runs']} runs"
    stages = (f"{name} {seconds:.3f}" for name, seconds in results["stage_seconds"].items() if seconds > 0)
    memory, steps = results["peak_memory_bytes"], results["steps"]
    threads = f"{results['threads']} thread{'s' * (results['threads'] > 1)}"
    rows = {
        "model": f"{results['model']}, {results['width']}x{results['height']}, {steps} step{'s' * (steps > 1)}",
        "machine": f"{results['hardware']}, {results['device']}, {results['dtype']}, {threads}",
        "versions": f"fewstep {results['fewstep']}, torch {results['torch']}, Python {results['python']}",
        "commit": results["commit"],
        "to load": f"{results['load_seconds']:.2f} s",
        "first image": f"{results['first_picture_seconds']:.2f} s, loading included",
        "next images": f"{results['picture_seconds']:.3f} s ({spread})",
        "stages": f"{', '.join(stages)} s",
        "peak memory": "unknown" if memory is None else f"{memory / 1e9:.2f} GB",
    }
    return "\n".join(f"{name:15}{text}" for name, text in rows.items())


def _load(model: str | None, threads: int | None, **options: Any) -> Pipeline:
    import torch

    import fewstep

    if threads is not None:
        torch.set_num_threads(threads)
    return fewstep.load(model, **options)
