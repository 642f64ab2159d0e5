"""The run of a task from its networks: one of them, or text to image by a shared loop for NumPy and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from math import log, sqrt
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.tasks import Run, RunOutput, Task, inputs, noise, prompt, token_ids

SAMPLERS = ("euler", "dpmpp_2m")
"""What `sample` knows, by fewstep's names."""

Network = Callable[..., Any]
Predict = Callable[[Any, int], Any]
"""Latents of unit variance and a step's number -> the noise in them."""


class Arrays(NamedTuple):
    """A runner's arrays: how to make one from NumPy's, to put some end to end, and to wait until all are there."""

    made: Callable[[Any], Any] = lambda value: value
    joined: Callable[[Sequence[Any]], Any] = np.concatenate
    wait: Callable[[], None] = lambda: None


NUMPY = Arrays()


def torch_arrays(device: str) -> Arrays:
    """Tensors on `device`."""
    import torch

    cuda = device.startswith("cuda")
    return Arrays(
        made=lambda value: torch.from_numpy(value).to(device),
        joined=lambda values: torch.cat(list(values)),
        wait=torch.cuda.synchronize if cuda else NUMPY.wait,
    )


def run_of(task: Task, networks: Mapping[str, Network], arrays: Arrays) -> Run:
    """The run of a task from its networks, by kind."""
    if task.part == "whole":
        return _whole(task, networks, arrays)
    (piece,) = task.pieces
    network, given = networks[piece.kind], [arrays.made(value) for value in inputs(task, piece)]

    def run() -> RunOutput:
        output = network(*given)
        arrays.wait()
        return RunOutput(output)

    return run


def _whole(task: Task, networks: Mapping[str, Network], arrays: Arrays) -> Run:
    text, unet, _ = task.pieces
    times = [arrays.made(np.full(unet.rows, t, dtype=np.float32)) for t in task.levels.times]
    start = arrays.made(noise(task) * np.float32(task.levels.scale))
    rows = [row for row in range(text.rows) for _ in range(task.batch)]
    scaling, numbers = task.scaling, count()

    def run() -> RunOutput:
        clock, ids = Clock(arrays.wait), token_ids(prompt(next(numbers)), guided=task.guided)
        with clock.stage("text"):
            context = networks["text"](arrays.made(ids))[rows]
        with clock.stage("unet"):

            def predict(x: Any, step: int) -> Any:
                return networks["unet"](x, times[step], context)

            noise_in = _guided(predict, task.guidance, arrays) if task.guided else predict
            latents = sample(noise_in, start, task.levels.sigmas, task.sampler)
        with clock.stage("decode"):
            image = networks["decode"](latents / scaling)
        return RunOutput(image, clock.seconds)

    return run


def _guided(predict: Predict, guidance: float, arrays: Arrays) -> Predict:
    """Classifier-free guidance (arXiv:2207.12598): both predictions by one call, the one without the prompt first."""

    def guided(x: Any, step: int) -> Any:
        both = predict(arrays.joined([x, x]), step)
        without_text, with_text = both[: len(x)], both[len(x) :]
        return without_text + guidance * (with_text - without_text)

    return guided


def sample(predict: Predict, x: Any, sigmas: Sequence[float], sampler: str) -> Any:
    """The latents at the end of `sigmas`, 0: Euler steps, or DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2).

    `x` is at level `sigmas[0]`.
    """
    assert sigmas[-1] == 0
    past, past_h = None, 0.0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * predict(x / sqrt(1 + sigma**2), step)
        target = x0
        if sampler == "dpmpp_2m" and sigma_next > 0:
            h = log(sigma / sigma_next)
            target = x0 if past is None else x0 + (x0 - past) * (h / (2 * past_h))
            past, past_h = x0, h
        x = target + (x - target) * (sigma_next / sigma)
    return x


class Clock:
    """Seconds of stages, measured after the device has finished them."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside is stage `name`."""
        started = perf_counter()
        yield
        self.wait()
        self.seconds[name] = perf_counter() - started
