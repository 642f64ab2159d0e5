"""What cannot draw is refused before any weight is read, by what it is and with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewstep
from fewstep.errors import CheckpointError, InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Family
from fewstep.weights import load as loading
from fewstep.weights.load import load_model, load_tiny, open_tensors
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model, save_single_file
from fewstep.weights.single import recognise
from tests.factories import small_model, text_configs, unet_config

Oracle = Callable[[str], tuple[Any, Path]]


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that would have read weights."""
    calls: list[Any] = []
    monkeypatch.setattr(loading, "_fill", lambda *arguments: calls.append(arguments))
    return calls


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path, dtype=torch.float32, **options)
    message = str(caught.value)
    assert str(path) in message
    return message


def saved(model: LoadedModel, folder: Path, *, single: bool) -> tuple[Path, dict[str, Any]]:
    """Where `model` was saved, and the options with which it is loaded."""
    save_model(model, folder / "model")
    if not single:
        return folder / "model", {}
    (folder / "one").mkdir()
    save_single_file(model, folder / "one" / "model.safetensors")
    for tokenizer, name in zip(model.tokenizers, ("tokenizer", "tokenizer_2"), strict=False):
        tokenizer.save(folder / "one" / ("tokenizer_2" if model.spec.family == "sdxl-refiner" else name))
    return folder / "one" / "model.safetensors", {"tokenizer": folder / "one"}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_parts_that_fit_load(family: Family, single: bool, tmp_path: Path, unread: list[Any]) -> None:
    path, options = saved(small_model(family), tmp_path, single=single)
    load_model(path, dtype=torch.float32, **options)
    assert unread


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    ("channels", "said"),
    [(8, "InstructPix2Pix"), (5, "depth"), (7, "upscaler"), (3, "no model of this family")],
)
def test_a_unet_that_reads_other_channels_is_named(
    channels: int, said: str, family: Family, single: bool, tmp_path: Path, unread: list[Any]
) -> None:
    path, options = saved(small_model(family, in_channels=channels), tmp_path, single=single)
    message = refusal(path, **options)
    assert f"the UNet reads {channels} channels" in message
    assert said in message
    assert not unread


@pytest.mark.parametrize("single", [False, True])
def test_inpainting_unets_load(single: bool, tmp_path: Path, unread: list[Any]) -> None:
    path, options = saved(small_model("sd1", in_channels=9), tmp_path, single=single)
    assert load_model(path, dtype=torch.float32, **options).spec.unet.in_channels == 9
    assert unread


@pytest.mark.parametrize("single", [False, True])
def test_an_sd2_model_of_another_shape_is_named_before_it_is_asked_what_it_predicts(
    single: bool, tmp_path: Path
) -> None:
    path, options = saved(small_model("sd2", in_channels=5), tmp_path, single=single)
    assert "depth" in refusal(path, **options)


def other_latents(family: Family) -> LoadedModel:
    model = small_model(family)
    autoencoder = AutoencoderKL(replace(model.spec.autoencoder, latent_channels=16))
    networks = replace(model.networks, autoencoder=autoencoder)
    return model.with_spec(autoencoder=autoencoder.config)._replace(networks=networks)


def other_text(family: Family, index: int, **changes: Any) -> LoadedModel:
    configs = list(text_configs(family))
    configs[index] = replace(configs[index], **changes)
    model = small_model(family)
    networks = replace(model.networks, text_encoders=tuple(map(TextEncoder, configs)))
    return model.with_spec(texts=tuple(configs))._replace(networks=networks)


MISFITS: dict[str, tuple[Callable[[], LoadedModel], str]] = {
    "latents": (lambda: other_latents("sd1"), "autoencoder has 16 latent channels; .* have 4"),
    "outputs": (lambda: small_model("sd1", out_channels=8), "UNet predicts 8 channels; latents have 4"),
    "context": (lambda: small_model("sd1", context=96), "states of width 64; the UNet's cross-attention reads 96"),
    "contexts": (lambda: small_model("sdxl", context=128), "states of width 192; the UNet's cross-attention reads 128"),
    "tower": (lambda: other_text("sd2", 0, width=128, heads=2), "states of width 128; .* reads 64"),
    "pooled": (lambda: small_model("sdxl", addition=32 + 6 * 256), "pooled state has width 64; the UNet reads 32"),
    "projection": (lambda: other_text("sdxl-refiner", 0, projection=32), "pooled state has width 32; .* reads 64"),
    "vocabulary": (lambda: other_text("sd1", 0, vocabulary=300, eos=299), "tokens up to 513, and its .* 300 of them"),
    "window": (lambda: other_text("sd1", 0, window=16), "windows of 77 tokens, and its text encoder of 16"),
    "eos": (lambda: other_text("sdxl", 1, eos=7), "ends texts with token 513, and its text encoder looks for 7"),
}


@pytest.mark.parametrize(
    ("name", "single"), [*((name, False) for name in MISFITS), *((name, True) for name in MISFITS if name != "eos")]
)  # single files do not say where their texts end
def test_parts_of_other_sizes_are_named(name: str, single: bool, tmp_path: Path, unread: list[Any]) -> None:
    make, said = MISFITS[name]
    path, options = saved(make(), tmp_path, single=single)
    with pytest.raises(CheckpointError, match=said):
        load_model(path, dtype=torch.float32, **options)
    assert not unread


def test_an_end_token_that_no_picture_depends_on_may_be_wrong(tmp_path: Path) -> None:
    save_model(other_text("sd1", 0, eos=7), tmp_path / "model")
    load_model(tmp_path / "model", dtype=torch.float32)


def test_windows_of_two_tokenizers_are_compared(tmp_path: Path) -> None:
    save_model(small_model("sdxl"), tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 20}))
    assert "tokenizers have windows of 20 and 77 tokens" in refusal(tmp_path / "model")


def test_a_model_without_one_of_its_text_encoders_is_refused(tmp_path: Path) -> None:
    save_model(small_model("sdxl"), tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    assert "has 1 text encoders; its UNet reads 2" in refusal(tmp_path / "model")


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    save_model(small_model("sd1"), tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    usual = config.read_text()
    config.write_text(json.dumps(json.loads(usual) | {"attention_head_dim": 7}))
    assert "64 channels cannot be shared among 7 attention heads" in refusal(tmp_path / "model")
    config.write_text(usual)
    text = tmp_path / "model" / "text_encoder" / "config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"num_attention_heads": 5}))
    assert "width 64 cannot be shared among 5" in refusal(tmp_path / "model")


def test_channels_of_a_single_file_that_its_heads_do_not_divide_are_refused(tmp_path: Path) -> None:
    config = unet_config("sd2")
    stages = (replace(config.stages[0], channels=224, heads=3), config.stages[1])  # 224 // 64 heads, as SD 2 has them
    model = small_model("sd2").with_unet(UNet(replace(config, stages=stages)))
    path, options = saved(model, tmp_path, single=True)
    assert "224 channels cannot be shared among 3 attention heads" in refusal(path, **options)


JUNK: list[Any] = [nan, inf, -1, 10**400, True, "5", None, {}, [[1]], 0.5]
NUMBERS = {
    "scheduler/scheduler_config.json": ["beta_start", "beta_end", "num_train_timesteps"],
    "unet/config.json": [
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "in_channels",
        "out_channels",
        "norm_num_groups",
        "transformer_layers_per_block",
    ],
    "vae/config.json": ["block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups"],
    "text_encoder/config.json": [
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "eos_token_id",
    ],
}
OTHERS = {
    "scheduler/scheduler_config.json": [
        "_class_name",
        "beta_schedule",
        "prediction_type",
        "timestep_spacing",
        "rescale_betas_zero_snr",
        "use_karras_sigmas",
        "set_alpha_to_one",
    ],
    "unet/config.json": ["down_block_types", "up_block_types", "act_fn", "use_linear_projection"],
    "vae/config.json": ["force_upcast", "scaling_factor"],
    "text_encoder/config.json": ["hidden_act"],
}
FINE = {
    ("attention_head_dim", None),
    ("use_karras_sigmas", True),
    ("use_karras_sigmas", None),
    ("set_alpha_to_one", True),
    ("set_alpha_to_one", None),
    ("timestep_spacing", None),
    ("rescale_betas_zero_snr", True),
    ("use_linear_projection", True),
    ("force_upcast", True),
    ("scaling_factor", 0.5),
    ("beta_end", 0.5),
}


@pytest.mark.parametrize(
    ("file", "key"), [(file, key) for table in (NUMBERS, OTHERS) for file, keys in table.items() for key in keys]
)
def test_a_value_that_no_model_has_is_named_with_its_file_and_key(
    file: str, key: str, oracle: Oracle, tmp_path: Path, unread: list[Any]
) -> None:
    folder = Path(shutil.copytree(oracle("sd1")[1], tmp_path / "copy"))
    path = folder / file
    usual = json.loads(path.read_text())
    for value in JUNK:
        if (key, value) in [(name, fine) for name, fine in FINE if type(fine) is type(value)]:
            continue
        path.write_text(json.dumps(usual | {key: value}))
        message = refusal(folder)
        assert file in message, (value, message)
        assert key in message or (key == "block_out_channels" and "block_types" in message), (value, message)
        assert len(message) < 1000
    assert not unread


@pytest.mark.parametrize(
    "betas",
    [
        {"beta_start": 1e-12, "beta_end": 1e-11},
        {"beta_start": 0.99, "beta_end": 0.999},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"num_train_timesteps": 100_000, "beta_end": 0.5},
        {"num_train_timesteps": 1},
        {"beta_schedule": "linear", "beta_end": 1},
    ],
)
def test_noise_levels_that_no_run_can_visit_are_refused(betas: dict[str, Any], oracle: Oracle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(oracle("sd1")[1], tmp_path / "copy"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | betas))
    message = refusal(folder)
    assert "scheduler_config.json: scheduler: beta" in message


@pytest.mark.parametrize("value", [nan, -5, True, "8", [8], [8, 8, 8], {}, 10**300, 0.5])
def test_a_sample_size_is_checked(value: Any, oracle: Oracle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(oracle("sd1")[1], tmp_path / "copy"))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": value}))
    assert "unet/config.json: sample_size is" in refusal(folder)


@pytest.mark.parametrize(
    "default",
    [
        {"steps": -3},
        {"steps": nan},
        {"steps": True},
        {"guidance_scale": nan},
        {"guidance_scale": "7"},
        {"width": 10**400},
        {"height": 7.5},
        {"sampler": "eular"},
        {"sampler": ["euler"]},
        {"schedule": 5},
        {"schedule": "karas"},
        {"\x1b[31m": 1},
    ],
)
def test_a_default_in_a_folder_is_checked(default: dict[str, Any], tmp_path: Path) -> None:
    save_model(small_model("sd1"), tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_fewstep": {"defaults": default}}))
    with pytest.raises(CheckpointError, match=r"model_index\.json: the default '.*' = .* cannot be used") as caught:
        load_model(tmp_path / "model", dtype=torch.float32)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("notes", [5, [], "x", {"defaults": []}, {"defaults": 7}, {"base": {}, "name": [1]}])
def test_notes_that_are_none_are_passed_over(notes: Any, tmp_path: Path) -> None:
    save_model(small_model("sd1"), tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_fewstep": notes}))
    assert load_model(tmp_path / "model", dtype=torch.float32).spec.defaults.steps == 50


PIPELINES: list[tuple[dict[str, Any], str]] = [
    (
        {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        },
        r"Stable Diffusion 3.* without unet",
    ),
    (
        {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
        },
        r"Flux.* without unet",
    ),
    (
        {
            "_class_name": "StableDiffusionControlNetPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "controlnet": ["diffusers", "ControlNetModel"],
        },
        r"StableDiffusionControlNetPipeline' with controlnet",
    ),
    (
        {
            "_class_name": "AnimateDiffPipeline",
            "unet": ["diffusers", "UNetMotionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "motion_adapter": ["diffusers", "MotionAdapter"],
        },
        r"AnimateDiffPipeline' with motion_adapter",
    ),
    ({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}, r"without vae and text_encoder"),
]


@pytest.mark.parametrize(("index", "said"), PIPELINES, ids=lambda value: str(value)[:40])
def test_the_folder_of_another_pipeline_is_called_what_it_is(index: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(tmp_path, dtype=torch.float32)
    assert "fewstep draws with" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ControlNetModel", "a ControlNet, which fewstep does not read"),
        ("AutoencoderKL", "an autoencoder alone; give the folder of a whole model"),
        ("AutoencoderTiny", "load a whole model with decoder= this folder"),
        ("UNet2DConditionModel", "one level up"),
        ("SD3Transformer2DModel", "newer family"),
        ("FluxTransformer2DModel", "newer family"),
        ("Whatever", "not the diffusers folder of a whole model"),
    ],
)
def test_the_folder_of_one_part_is_called_what_it_is(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    assert said in refusal(tmp_path)


def test_a_folder_of_files_asks_for_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "v1-5-pruned.safetensors").touch()
    assert "give that: 'v1-5-pruned.safetensors'" in refusal(tmp_path)


def test_a_tiny_decoder_wants_latents_of_an_eighth(tmp_path: Path) -> None:
    save_model(small_model("sd1"), tmp_path / "model")
    with pytest.raises(InputError, match="2 times as wide as latents; a tiny decoder needs 8"):
        fewstep.load(tmp_path / "model", device="cpu", decoder="blocks-tiny")


@pytest.mark.parametrize(
    "key", ["input_blocks.1.0.in_layers.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
)
@pytest.mark.parametrize("size", [0, 10**7])
def test_a_single_file_of_absurd_shapes_is_refused(key: str, size: int, tmp_path: Path) -> None:
    model = small_model("sd1")
    save_single_file(model, tmp_path / "model.safetensors")
    file = open_tensors(tmp_path / "model.safetensors")
    shapes = {**file.shapes, f"model.diffusion_model.{key}": (size, size, 3, 3)}
    with pytest.raises(CheckpointError, match=f"model.safetensors looks like sd1, but cannot be: .* is {size};"):
        recognise(replace(file, shapes=shapes))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_config.json"])
def test_the_folder_of_a_lora_is_called_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert "the folder of a LoRA; load its model, and add it with fewstep.add_lora" in refusal(tmp_path)


KEYS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA; load its model",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "a LoRA; load its model",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": "a LoRA; load",
    "lycoris_down_blocks_0_proj_in.hada_w1_a": "a LoRA; load its model",
    "lycoris_down_blocks_0_proj_in.lokr_w1": "a LoRA; load its model",
    "control_model.input_blocks.0.0.weight": "a ControlNet, which fewstep does not read",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet, which fewstep does not read",
    "controlnet_down_blocks.0.weight": "a ControlNet, which fewstep does not read",
    "double_blocks.0.img_attn.qkv.weight": "Flux family",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "Flux family",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3 model",
    "transformer_blocks.0.attn.to_q.weight": "newer family",
    "first_stage_model.decoder.conv_in.weight": "an autoencoder alone",
    "decoder.conv_in.weight": "an autoencoder alone",
    "decoder.layers.0.weight": "a tiny autoencoder; load a whole model with decoder=",
    "down_blocks.0.resnets.0.conv1.weight": "one part of a diffusers folder; give the folder",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder alone",
    "model.diffusion_model.input_blocks.0.0.weight": "a UNet without its text towers",
    "layers.0.weight": "something else",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_file_is_called_what_it_is(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 4, 3, 3)}, tmp_path / "file.safetensors")
    assert KEYS[key] in refusal(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"latent_channels": 16},
        {"decoder_block_out_channels": [64, 64, 64, 32]},
        {"decoder_block_out_channels": [nan] * 4, "encoder_block_out_channels": [nan] * 4},
        {"decoder_block_out_channels": [10**9] * 4, "encoder_block_out_channels": [10**9] * 4},
        {"act_fn": "silu"},
        {"num_decoder_blocks": [1, 1, 1, 1]},
    ],
)
def test_a_tiny_autoencoder_of_another_shape_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"} | change))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_tiny(tmp_path, dtype=torch.float32)
