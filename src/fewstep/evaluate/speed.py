"""The speed of a loaded model on this machine: seconds of its images and of their stages."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fewstep.evaluate.environment import hardware, source_commit
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pipeline.result import Result
from fewstep.version import __version__

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "purple")


def prompt(number: int) -> str:
    """A prompt that differs for each number: a cached text encoding is no speed of generation."""
    count = len(COLOURS)
    top, bottom = COLOURS[number % count], COLOURS[number // count % count]
    return f"a {top} cube on top of a {bottom} sphere" if number < count**2 else f"{number} {top} cubes"


def image_of(pipe: Pipeline, settings: Mapping[str, Any], number: int) -> Result:
    """Image number `number` of a measurement, with a prompt and a seed of its own."""
    return pipe.text_to_image(**{**settings, "prompt": prompt(number), "seed": number})


def measure(pipe: Pipeline, settings: Mapping[str, Any], runs: int) -> dict[str, Any]:
    """Seconds of `runs` images after the first one: median, fastest, slowest, and the medians of their stages."""
    seconds: list[float] = []
    results: list[Result] = []
    for number in range(1, runs + 1):
        started = perf_counter()
        results.append(image_of(pipe, settings, number))
        seconds.append(perf_counter() - started)
    stages = {name: [each.seconds[name] for each in results if name in each.seconds] for name in results[-1].seconds}
    return {
        "runs": runs,
        "picture_seconds": median(seconds),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "stage_seconds": {name: median(each) for name, each in stages.items()},
    }


def describe_run(pipe: Pipeline, first: Result) -> dict[str, Any]:
    """The versions, commit, machine, model and settings of a measurement whose first image is `first`."""
    names = ("width", "height", "steps", "guidance_scale", "sampler")
    return {
        "fewstep": __version__,
        "commit": source_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware(pipe.engine.device),
        "device": str(pipe.engine.device),
        "threads": getattr(pipe.engine, "threads", torch.get_num_threads()),
        "engine": type(pipe.engine).__name__,
        "model": pipe.spec.name,
        "dtype": str(pipe.networks.unet.conv_in.weight.dtype).removeprefix("torch."),
        **{name: first.settings[name] for name in names},
    }
