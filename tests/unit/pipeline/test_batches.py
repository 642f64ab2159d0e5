"""A picture does not depend on the company it is drawn in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.engines.autotune import Autotuner, Candidates
from fewstep.engines.cpu import engine
from fewstep.engines.cpu.build import kernels
from fewstep.weights.load import load_model

PROMPTS = ("a red cube on top of a blue sphere", "a green cone", "a small purple torus")


def drawn(pipe: fewstep.Pipeline, batch: int) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Final latents and pictures of six seeds, `batch` of them at a time."""
    prompts, seeds, options = PROMPTS * 2, list(range(6)), {"steps": 2, "width": 96, "height": 64}
    parts = [slice(first, first + batch) for first in range(0, 6, batch)]
    results = [pipe.text_to_image(prompts[part], seed=seeds[part], **options, output="latent") for part in parts]
    latents = torch.cat([result.latents for result in results])
    pictures = pipe.decode(latents) if batch == 6 else [pipe.decode(one[None])[0] for one in latents]
    return latents, [np.asarray(picture, np.int16) for picture in pictures]


class Fixed(Autotuner):
    """Runs the first candidate each time, a library's, or the last one, the kernel's."""

    def __init__(self, candidate: int) -> None:
        super().__init__()
        self.candidate = candidate

    def run(self, key: str, candidates: Candidates) -> torch.Tensor:
        return list(candidates.values())[self.candidate]()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("candidate", [0, -1])
def test_kernels_draw_the_same_numbers_alone_and_in_a_batch(
    guidance_scale: float, candidate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels() is None:
        pytest.skip("no C compiler; pip install 'fewstep[kernels]'")
    model = load_model("blocks-base", dtype=torch.float32)
    pipe = fewstep.Pipeline(
        model.spec, model.tokenizers, engine.CpuEngine(model.spec, model.networks, autotuner=Fixed(candidate))
    )
    draw = pipe.text_to_image
    monkeypatch.setattr(pipe, "text_to_image", lambda *a, **k: draw(*a, **k, guidance_scale=guidance_scale))
    alone, pictures = drawn(pipe, 1)
    for batch in (2, 3, 6):
        together, others = drawn(pipe, batch)
        assert torch.equal(together, alone)
        assert all(np.array_equal(one, other) for one, other in zip(pictures, others, strict=True))


def test_without_kernels_they_are_the_same_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries round products of several pictures otherwise: README says by how much at most."""
    monkeypatch.setattr(engine, "kernels", lambda: None)
    pipe: Any = fewstep.load("blocks-base", device="cpu")
    (alone, pictures), (together, others) = drawn(pipe, 1), drawn(pipe, 6)
    assert float((together - alone).abs().max() / alone.abs().max()) < 5e-5
    assert max(int(np.abs(one - other).max()) for one, other in zip(pictures, others, strict=True)) <= 1
