"""Editions that are shipped as the LoRA of their difference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fewstep
from fewstep.adapters.extract import extracted_lora
from fewstep.adapters.inject import ATTENTION
from fewstep.adapters.lora import layers_of, networks
from fewstep.adapters.merge import fuse_lora
from fewstep.errors import InputError
from fewstep.weights.parts import Parts


def base() -> Parts:
    return fewstep.load("blocks-base", device="cpu", dtype="float32").parts


@torch.no_grad()
def changed(parts: Parts, rank: int) -> list[str]:
    """Some layers, changed by matrices of a rank."""
    torch.manual_seed(0)
    names = [
        name for name in layers_of(networks(parts)) if name.startswith("unet") and name.endswith(("conv1", *ATTENTION))
    ]
    for name in names:
        weight = layers_of(networks(parts))[name].weight
        flat = weight.flatten(1)
        weight += (0.01 * torch.randn(len(flat), rank) @ torch.randn(rank, flat.shape[1])).view_as(weight)
    return names


def test_a_difference_of_low_rank_is_found_exactly() -> None:
    parts, tuned = base(), base()
    names = changed(tuned, 4)
    lora, left = extracted_lora(parts, tuned, rank=4)
    assert set(lora.layers) == set(names)
    assert left < 1e-3
    fuse_lora(parts, lora)
    for name in names:
        ours, theirs = (layers_of(networks(each))[name].weight for each in (parts, tuned))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_lower_rank_leaves_some_of_it_out() -> None:
    parts, tuned = base(), base()
    changed(tuned, 4)
    apart = [extracted_lora(parts, tuned, rank=rank)[1] for rank in (1, 2, 3)]
    assert 1 > apart[0] > apart[1] > apart[2] > 0.1


def test_models_of_other_layers_are_refused() -> None:
    parts = base()
    other = replace(parts, text_encoders=())
    with pytest.raises(InputError, match="other layers"):
        extracted_lora(parts, other, rank=2)
    with pytest.raises(InputError, match="1 or more"):
        extracted_lora(parts, parts, rank=0)


def test_the_embedded_turbo_draws_at_once_and_by_itself() -> None:
    turbo, plain = fewstep.load("blocks-turbo", device="cpu"), fewstep.load("blocks-base", device="cpu")
    assert turbo.parts.name == "blocks-turbo"
    assert (turbo.parts.defaults.steps, turbo.parts.defaults.guidance_scale) == (1, 0.0)
    assert (plain.parts.defaults.steps, plain.parts.name) == (10, "blocks-base")
    prompt = "a red cube on top of a blue sphere"
    drawn, blurred = (pipe.text_to_image(prompt, steps=1, seed=3, output="latent").latents for pipe in (turbo, plain))
    assert (drawn - blurred).square().mean() > 0.05
    fewstep.remove_lora(turbo)  # takes out what the user merged, which is nothing
    assert torch.equal(turbo.text_to_image(prompt, steps=1, seed=3, output="latent").latents, drawn)
