"""What all engines are asked: the same pictures as the plain one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

import fewstep
from fewstep import Pipeline
from fewstep.engines.autotune import Autotuner, Candidates
from fewstep.engines.cuda.graphs import Function, Given

PROMPTS = ["a red cube on top of a blue sphere", "a photo"]
SIZE = {"width": 72, "height": 104}
Pair = tuple[Pipeline, Pipeline]


class Last(Autotuner):
    """Runs the last candidate each time: never the plain one."""

    def run(self, key: str, candidates: Candidates) -> Tensor:
        return list(candidates.values())[-1]()


class Replayed:
    """What a CUDA graph is, without one: a replay reads and writes the tensors that it was recorded with, no others."""

    def __init__(self, function: Function, given: Given) -> None:
        self.inputs = [None if each is None else each.clone() for each in given]
        self.function = function
        self.outputs = function(*self.inputs)

    def replay(self, given: Given) -> Sequence[Tensor | None]:
        for held, each in zip(self.inputs, given, strict=True):
            assert (held is None) == (each is None)
            if held is not None and each is not None:
                held.copy_(each)
        for held, each in zip(self.outputs, self.function(*self.inputs), strict=True):
            if held is not None and each is not None:
                held.copy_(each)
        return self.outputs


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (104, 72, 3), dtype=np.uint8))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def assert_same(both: Pair, task: str, *arguments: object, **options: object) -> None:
    """Final latents and pictures of the two are within 1e-4."""
    (plain, wanted), (fast, found) = (
        _drawn(lambda pipe=pipe, **more: getattr(pipe, task)(PROMPTS, *arguments, **options, **more)) for pipe in both
    )
    assert error(fast, plain) <= 1e-4
    assert np.abs(found.astype(float) - wanted.astype(float)).max() <= 1e-4 * max(1, np.abs(wanted).max())


def _drawn(draw: Callable[..., fewstep.Result], **options: object) -> tuple[Tensor, np.ndarray]:
    latents = draw(**options, output="latent").latents
    assert latents is not None
    return latents, draw(**options, output="numpy").array
