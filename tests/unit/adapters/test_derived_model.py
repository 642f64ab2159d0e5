"""The embedded editions: blocks-turbo is a LoRA of blocks-base, blocks-small has a UNet of its own alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep.adapters.extract import extracted_lora
from fewstep.adapters.inject import ATTENTION
from fewstep.adapters.lora import layers_of, networks
from fewstep.adapters.merge import fuse_lora
from fewstep.errors import CheckpointError, InputError
from fewstep.weights.derived_model import VECTORS, vectors
from fewstep.weights.fetch import ASSETS
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel


def base() -> LoadedModel:
    return load_model("blocks-base", dtype=torch.float32)


@torch.no_grad()
def changed(model: LoadedModel, rank: int) -> list[str]:
    """Some layers, changed by matrices of a rank."""
    torch.manual_seed(0)
    names = [
        name for name in layers_of(networks(model)) if name.startswith("unet") and name.endswith(("conv1", *ATTENTION))
    ]
    for name in names:
        weight = layers_of(networks(model))[name].weight
        flat = weight.flatten(1)
        weight += (0.01 * torch.randn(len(flat), rank) @ torch.randn(rank, flat.shape[1])).view_as(weight)
    return names


def test_a_difference_of_low_rank_is_found_exactly() -> None:
    model, tuned = base(), base()
    names = changed(tuned, 4)
    lora, left = extracted_lora(model, tuned, rank=4)
    assert set(lora.layers) == set(names)
    assert left < 1e-3
    fuse_lora(model, lora)
    for name in names:
        ours, theirs = (layers_of(networks(each))[name].weight for each in (model, tuned))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_lower_rank_leaves_some_of_it_out() -> None:
    model, tuned = base(), base()
    changed(tuned, 4)
    apart = [extracted_lora(model, tuned, rank=rank)[1] for rank in (1, 2, 3)]
    assert 1 > apart[0] > apart[1] > apart[2] > 0.1


def test_models_of_other_layers_are_refused() -> None:
    model = base()
    other = model._replace(networks=replace(model.networks, text_encoders=()))
    with pytest.raises(InputError, match="other layers"):
        extracted_lora(model, other, rank=2)
    with pytest.raises(InputError, match="1 or more"):
        extracted_lora(model, model, rank=0)


def test_the_embedded_turbo_draws_at_once_and_by_itself() -> None:
    turbo, plain = fewstep.load("blocks-turbo", device="cpu"), fewstep.load("blocks-base", device="cpu")
    assert turbo.spec.name == "blocks-turbo"
    assert (turbo.spec.defaults.steps, turbo.spec.defaults.guidance_scale) == (4, 0.0)
    assert (plain.spec.defaults.steps, plain.spec.name) == (10, "blocks-base")
    prompt = "a red cube on top of a blue sphere"
    drawn, blurred = (pipe.text_to_image(prompt, steps=1, seed=3, output="latent").latents for pipe in (turbo, plain))
    assert (drawn - blurred).square().mean() > 0.05
    fewstep.remove_lora(turbo)  # takes out what the user merged, which is nothing
    assert torch.equal(turbo.text_to_image(prompt, steps=1, seed=3, output="latent").latents, drawn)


def test_the_embedded_turbo_has_biases_and_norms_of_its_own() -> None:
    turbo, plain = (fewstep.load(name, device="cpu").networks.unet for name in ("blocks-turbo", "blocks-base"))
    own = load_file(ASSETS / "blocks-turbo" / VECTORS)
    assert own.keys() == vectors(turbo).keys()
    assert all(torch.equal(value, own[name].float()) for name, value in vectors(turbo).items())
    assert any(not torch.equal(value, vectors(plain)[name]) for name, value in vectors(turbo).items())


def test_the_tiny_decoder_draws_what_the_large_one_draws() -> None:
    quick, plain = (fewstep.load("blocks-base", device="cpu", decoder=which) for which in ("tiny", None))
    latents = plain.text_to_image("a red cube", steps=4, seed=3, output="latent").latents
    one, other = (pipe.engine.decode(latents).clamp(-1, 1) for pipe in (quick, plain))
    assert (one - other).square().mean() < 0.02
    with pytest.raises(InputError, match="blocks-tiny"):
        fewstep.load("blocks-base", device="cpu", decoder=ASSETS / "blocks-base")


def test_the_embedded_models_are_small_together() -> None:
    files = [path for folder in ASSETS.glob("blocks-*") for path in folder.rglob("*.safetensors")]
    assert files
    assert sum(path.stat().st_size for path in files) < 30_000_000


def test_the_small_model_shares_the_other_parts_of_its_base() -> None:
    small, plain = (load_model(name, dtype=torch.float32) for name in ("blocks-small", "blocks-base"))
    ours, theirs = (sum(p.numel() for p in model.networks.unet.parameters()) for model in (small, plain))
    assert 0.6 < ours / theirs < 0.7
    for one, other in list(zip(small.networks, plain.networks, strict=True))[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("base", ["sd-v1-4", "../blocks-base", 7, None])
def test_only_parts_of_embedded_models_are_shared(base: object, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(Path(fewstep.__file__).parent / "assets" / "blocks-small", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_fewstep"]["base"] = base
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="vae"):
        fewstep.load(folder, device="cpu")


def test_a_saved_small_model_is_whole(tmp_path: Path) -> None:
    fewstep.load("blocks-small", device="cpu").save(tmp_path / "small")
    assert (tmp_path / "small" / "vae").is_dir()
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    assert "base" not in index["_fewstep"]
    fewstep.load(tmp_path / "small", device="cpu")
