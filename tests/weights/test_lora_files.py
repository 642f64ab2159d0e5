"""Files of LoRAs: the layouts of all common trainers, alphas, what is refused and why, and what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.adapters.lora import Factors, Lora, layers_of, networks
from fewstep.adapters.names import layer_names
from fewstep.adapters.read import read_lora
from fewstep.adapters.save import save_lora
from fewstep.errors import CheckpointError, InputError
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE
from fewstep.weights.layouts import UNET_PREFIX, single_places
from fewstep.weights.model import LoadedModel
from tests import factories

RANK = 2
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def model() -> Callable[[str], LoadedModel]:
    made = {family: factories.small_model(family) for family in factories.FAMILIES}
    return made.__getitem__


def whole_lora(model: LoadedModel, alpha: float = 1.5) -> Lora:
    """A change of every layer of the model."""
    layers = {}
    for name, layer in layers_of(networks(model)).items():
        shape = layer.weight.shape
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2))
        layers[name] = Factors(down=torch.randn(RANK, *shape[1:]), up=up, alpha=alpha)
    return Lora(name="whole", layers=layers)


def assert_same(ours: Lora, theirs: Lora) -> None:
    assert ours.layers.keys() == theirs.layers.keys()
    for name, factors in ours.layers.items():
        assert torch.allclose(factors.product(), theirs.layers[name].product(), atol=1e-5)


# layouts


@cache
def original(model: LoadedModel) -> dict[str, str]:
    """From the UNet's parameters to their names in an original single file."""
    (_, places), *_ = single_places(model.spec.family, model.networks)
    return {name: place.key.removeprefix(UNET_PREFIX) for name, place in places.items()}


def diffusers(model: LoadedModel, name: str) -> str:
    return name


def old_diffusers(model: LoadedModel, name: str) -> str:
    """Attention by its processors, whose output layer has no number; text towers in the UNet's words."""
    name = re.sub(r"attn(\d)\.", r"attn\1.processor.", name).replace("to_out.0", "to_out")
    return re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", name)


def new_transformers(model: LoadedModel, name: str) -> str:
    return name.replace("text_model.", "")


def kohya(model: LoadedModel, name: str) -> str:
    network, _, layer = name.partition(".")
    first = "lora_te1_" if len(model.networks.text_encoders) > 1 else "lora_te_"
    return {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}[network] + layer.replace(
        ".", "_"
    )


def kohya_original(model: LoadedModel, name: str) -> str:
    """SDXL's UNet by its original names."""
    if not name.startswith("unet."):
        return kohya(model, name)
    layer = original(model)[f"{name.removeprefix('unet.')}.weight"].removesuffix(".weight")
    return f"lora_unet_{layer.replace('.', '_')}"


def comfy(model: LoadedModel, name: str) -> str:
    network, _, layer = name.partition(".")
    if network != "unet":
        tower = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[network]
        return f"text_encoders.{tower}.transformer.{layer}"
    return "diffusion_model." + original(model)[f"{layer}.weight"].removesuffix(".weight")


LAYOUTS: dict[str, tuple[Callable[[LoadedModel, str], str], str, str, str]] = {
    "diffusers": (diffusers, ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "diffusers lora.down": (diffusers, ".lora.down.weight", ".lora.up.weight", ".alpha"),
    "diffusers towers": (diffusers, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".alpha"),
    "diffusers processors": (old_diffusers, "_lora.down.weight", "_lora.up.weight", ".alpha"),
    "newer transformers": (new_transformers, ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "named adapter": (diffusers, ".lora_A.default.weight", ".lora_B.default.weight", ".alpha"),
    "kohya": (kohya, ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "kohya, original names": (kohya_original, ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "ComfyUI": (comfy, ".lora_down.weight", ".lora_up.weight", ".alpha"),
}


def tensors_of(lora: Lora, model: LoadedModel, layout: str) -> dict[str, Tensor]:
    rename, down, up, alpha = LAYOUTS[layout]
    tensors = {}
    for name, factors in lora.layers.items():
        theirs = rename(model, name)
        tensors[theirs + down], tensors[theirs + up] = factors.down, factors.up
        tensors[theirs + alpha] = torch.tensor(factors.alpha)
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_in_every_layout(model, tmp_path, family, layout):
    model = model(family)
    lora = whole_lora(model)
    save_file(tensors_of(lora, model, layout), tmp_path / "a.safetensors")
    assert_same(read_lora(tmp_path / "a.safetensors", model), lora)


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_peft_saves_one_network_without_its_name(model, tmp_path, network):
    model, prefix = model("sd1"), f"{network}."
    whole = whole_lora(model, alpha=RANK)
    lora = replace(whole, layers={name: f for name, f in whole.layers.items() if name.startswith(prefix)})
    tensors = {}
    for name, factors in lora.layers.items():
        tensors[f"base_model.model.{name.removeprefix(prefix)}.lora_A.weight"] = factors.down
        tensors[f"base_model.model.{name.removeprefix(prefix)}.lora_B.weight"] = factors.up
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_same(read_lora(tmp_path, model), lora)


def test_the_refiner_has_the_second_tower_alone(model, tmp_path):
    model = model("sdxl-refiner")
    lora = whole_lora(model)
    assert any(name.startswith("text_encoder_2.") for name in lora.layers)
    save_file(tensors_of(lora, model, "kohya"), tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", model)
    assert read.layers.keys() == lora.layers.keys()


PUBLISHED = {  # names in files that the models' users have
    "sd-v1-4": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_up_blocks_2_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_v",
    ),
    "sdxl-base": (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_1_proj_in",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_q",
        "lora_te1_text_model_encoder_layers_0_self_attn_v_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_published_files_fit_the_published_models(name):
    entry = CATALOGUE[name]
    assert entry.unet is not None
    with torch.device("meta"):
        towers = tuple(TextEncoder(config) for config in entry.texts)
        model = factories.small_model(entry.family)
        model = model._replace(networks=replace(model.networks, text_encoders=tuple(towers))).with_unet(
            UNet(entry.unet)
        )
    assert set(PUBLISHED[name]) <= layer_names(model).keys()


def test_a_linear_lora_of_a_projection_that_is_a_convolution(model, tmp_path):
    """Trainers disagree on what a 1x1 convolution is."""
    name, model = "unet.down_blocks.0.attentions.0.proj_in", model("sd1")
    down, up = torch.randn(3, 64), torch.randn(64, 3)
    flat = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    square = {key: tensor[:, :, None, None].contiguous() for key, tensor in flat.items()}
    for tensors in (flat, square):
        save_file(tensors, tmp_path / "a.safetensors")
        read = read_lora(tmp_path / "a.safetensors", model)
        assert torch.allclose(read.layers[name].product(), up @ down)


# alpha


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"


def pair(**halves: Tensor) -> dict[str, Tensor]:
    """Two layers of rank 4."""
    return {
        f"{name}.lora_{half}.weight": halves.get(half, torch.ones(shape)).clone()
        for name in (LAYER, OTHER)
        for half, shape in (("A", (4, 64)), ("B", (64, 4)))
    }


ALPHAS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "none": ({}, (4, 4)),
    "one for all": ({"lora_alpha": 2}, (2, 2)),
    "of the network": ({"unet.lora_alpha": 2, "text_encoder.lora_alpha": 9}, (2, 2)),
    "of another network": ({"text_encoder.lora_alpha": 9}, (4, 4)),
    "a pattern": ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_v": 8}}, (2, 8)),
    "a whole name": ({"lora_alpha": 2, "alpha_pattern": {f"^{OTHER.removeprefix('unet.')}": 8}}, (2, 8)),
    "rank-stabilised": ({"lora_alpha": 2, "use_rslora": True}, (4, 4)),
}


@pytest.mark.parametrize("case", ALPHAS)
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "inside"])
def test_alpha_by_the_settings(model, tmp_path, case, beside):
    settings, wanted = ALPHAS[case]
    if beside:
        save_file(pair(), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        notes = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
        save_file(pair(), tmp_path / "pytorch_lora_weights.safetensors", metadata=notes)
    read = read_lora(tmp_path, model("sd1"))
    assert (read.layers[LAYER].alpha, read.layers[OTHER].alpha) == wanted


def test_an_alpha_beside_the_tensors_goes_before(model, tmp_path):
    tensors = pair() | {f"{LAYER}.alpha": torch.tensor(0.5, dtype=torch.float16)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    read = read_lora(tmp_path / "a.safetensors", model("sd1"))
    assert (read.layers[LAYER].alpha, read.layers[OTHER].alpha) == (0.5, 2)


# what is refused


def refusal(tensors: dict[str, Tensor], model: LoadedModel, folder: Path, **notes: str) -> str:
    save_file(tensors, folder / "a.safetensors", metadata=notes or None)
    with pytest.raises(CheckpointError) as caught:
        read_lora(folder / "a.safetensors", model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "a DoRA"),
        (f"{LAYER}.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "a LoKr"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "Tucker"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "an OFT"),
        (f"{LAYER}.lora_B.bias", "biases"),
        ("lora_unet_conv_in.diff", "whole differences"),
        ("clip_g", "more than a LoRA: clip_g"),
    ],
)
def test_other_adapters_are_called_by_their_names(model, tmp_path, key, what):
    says = refusal(pair() | {key: torch.ones(4)}, model("sd1"), tmp_path)
    assert what in says
    assert key in says


def test_a_file_without_any_lora(model, tmp_path):
    says = refusal(dict(model("sd1").networks.unet.state_dict()), model("sd1"), tmp_path)
    assert "holds no LoRA: add" in says or "holds no LoRA: conv_in" in says
    assert "lora_unet_*.lora_down.weight" in says


ELSEWHERE = {
    "SDXL": {"lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_down.weight": (4, 5120)},
    "SD 2": {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 1024)},
    "the SDXL refiner": {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 1280)},
    "Flux": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 3072)},
    "SD 3": {"lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": (4, 1536)},
}


@pytest.mark.parametrize("made_for", ELSEWHERE)
def test_a_lora_of_another_model_is_told_apart(model, tmp_path, made_for):
    ((key, shape),) = ELSEWHERE[made_for].items()
    up = key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
    says = refusal(pair() | {key: torch.ones(shape), up: torch.ones(64, 4)}, model("sd1"), tmp_path)
    assert f"is made for {made_for} and does not fit a tiny sd1 (SD 1); nothing was applied" in says


def test_misfits_are_told_together(model, tmp_path):
    tensors = pair() | {"unet.gone.lora_A.weight": torch.ones(1, 1), "unet.gone.lora_B.weight": torch.ones(1, 1)}
    tensors[f"{LAYER}.lora_A.weight"] = torch.ones(4, 63)
    del tensors[f"{OTHER}.lora_B.weight"]
    says = refusal(tensors, model("sd1"), tmp_path)
    assert "layers unknown to it (1): unet.gone" in says
    assert f"layers of another shape (1): {LAYER}" in says
    assert f"layers without one of their two halves (1): {OTHER}" in says


BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "ranks differ": (pair(A=torch.ones(3, 64)), {}, "of another shape"),
    "rank 0": (pair(A=torch.ones(0, 64), B=torch.ones(64, 0)), {}, "of another shape"),
    "vectors": (pair(A=torch.ones(64)), {}, "of another shape"),
    "integers": (pair(A=torch.ones(4, 64, dtype=torch.int8)), {}, "not of floating point"),
    "NaN": (pair(A=torch.full((4, 64), float("nan"))), {}, "NaN or infinity"),
    "alphas": (pair() | {f"{LAYER}.alpha": torch.ones(2)}, {}, "several alphas"),
    "alpha infinite": (pair() | {f"{LAYER}.alpha": torch.tensor(float("inf"))}, {}, "alpha of unet.down"),
    "alpha in words": (pair(), {"lora_adapter_metadata": '{"unet.lora_alpha": "big"}'}, "alpha of unet.down"),
    "no JSON": (pair(), {"lora_adapter_metadata": "{"}, "not JSON"),
    "no object": (pair(), {"lora_adapter_metadata": "[]"}, "no JSON object"),
    "nothing": ({}, {}, "holds no LoRA: nothing"),
    "twice": (pair() | {f"{LAYER}.lora.down.weight": torch.ones(4, 64)}, {}, "there twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(model, tmp_path, case):
    tensors, notes, says = BROKEN[case]
    assert says in refusal(tensors, model("sd1"), tmp_path, **notes)


def test_a_torch_archive_is_read_without_running_it(model, tmp_path):
    torch.save(pair(), tmp_path / "a.pt")
    assert read_lora(tmp_path / "a.pt", model("sd1")).layers.keys() == {LAYER, OTHER}
    torch.save({**pair(), "evil": Path("x")}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="pathlib"):
        read_lora(tmp_path / "b.pt", model("sd1"))


def test_a_page_is_no_lora(model, tmp_path):
    (tmp_path / "a.safetensors").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError, match="HTML"):
        read_lora(tmp_path / "a.safetensors", model("sd1"))


def test_where_there_is_none(model, tmp_path):
    with pytest.raises(InputError, match="is not there"):
        read_lora(tmp_path / "gone.safetensors", model("sd1"))
    with pytest.raises(InputError, match=r"neither adapter_model\.safetensors nor"):
        read_lora(tmp_path, model("sd1"))


# what is written


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_read_again(model, tmp_path, family, layout):
    lora = whole_lora(model(family), alpha=5.0)
    save_lora(lora, tmp_path / "a.safetensors", layout=layout)
    assert_same(read_lora(tmp_path / "a.safetensors", model(family)), lora)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_programs_that_know_no_metadata_get_the_right_strength(model, tmp_path):
    """They take the rank for alpha."""
    lora = whole_lora(model("sd1"), alpha=5.0)
    save_lora(lora, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    product = tensors[f"{LAYER}.lora_B.weight"] @ tensors[f"{LAYER}.lora_A.weight"]
    assert torch.allclose(product, lora.layers[LAYER].product(), atol=1e-5)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        noted = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (noted["unet.r"], noted["unet.lora_alpha"]) == (RANK, RANK)


def test_half_precision_files(model, tmp_path):
    save_lora(whole_lora(model("sd1")), tmp_path / "a.safetensors", layout="kohya", dtype=torch.float16)
    tensors = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert read_lora(tmp_path / "a.safetensors", model("sd1"))


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        ("a.safetensors", "koyha", "did you mean 'kohya'"),
        ("a.pt", "kohya", "name a .safetensors file"),
        ("gone/a.safetensors", "kohya", "in a folder that is there"),
    ],
)
def test_what_cannot_be_saved(model, tmp_path, name, layout, says):
    with pytest.raises(InputError, match=says):
        save_lora(whole_lora(model("sd1")), tmp_path / name, layout=layout)
    assert not list(tmp_path.iterdir())
