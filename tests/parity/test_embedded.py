"""The embedded model is a diffusers model too: diffusers loads its folder and draws the same pictures."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch

import fewstep
from fewstep import Pipeline
from tests import oracles

FOLDER = Path(fewstep.__file__).parent / "assets" / "blocks-base"


def test_diffusers_draws_the_same_picture(embedded: Pipeline) -> None:
    oracles.quiet()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    prompt, defaults = "a red cube on top of a blue sphere", embedded.spec.defaults
    wanted = theirs(
        prompt,
        num_inference_steps=10,
        guidance_scale=defaults.guidance_scale,
        generator=[torch.Generator().manual_seed(7)],
        height=defaults.height,
        width=defaults.width,
    ).images[0]
    ours = embedded.text_to_image(prompt, steps=10, seed=7).images[0]
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(wanted, np.int16)).max() <= 1
