"""Diffusers folders: what diffusers saved loads here, in every form, and what is saved here loads there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.adapters.lora import Factors, Lora
from fewstep.adapters.save import save_lora
from fewstep.errors import CheckpointError, InputError, NotFiniteError
from fewstep.models.zoo import Family
from fewstep.weights.load import load_model, load_tiny
from fewstep.weights.save import save_model, save_single_file
from fewstep.weights.scheduler import SchedulerConfig
from tests.factories import FAMILIES, assert_same_weights, networks, small_model

Oracle = Callable[[str], tuple[Any, Path]]
KINDS = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "refiner": "sdxl-refiner", "inpaint": "sd1"}
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def copy(oracle: Oracle, tmp_path: Path) -> Path:
    """A folder of a tiny SD 1 to spoil."""
    return Path(shutil.copytree(oracle("sd1")[1], tmp_path / "copy"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saved_loads(oracle: Oracle, kind: str) -> None:
    pipe, folder = oracle(kind)
    loaded = load(folder)
    assert loaded.spec.family == KINDS[kind]
    theirs = [pipe.unet, pipe.vae, getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)]
    for ours, network in zip(networks(loaded).values(), filter(None, theirs), strict=True):
        state = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
        mine = {key.removeprefix("text_model."): value for key, value in ours.state_dict().items()}
        assert state.keys() == mine.keys()
        assert all(torch.equal(mine[key], state[key]) for key in state)
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner", "inpaint"])
def test_what_we_save_diffusers_loads(oracle: Oracle, kind: str, tmp_path: Path) -> None:
    pipe, folder = oracle(kind)
    loaded = load(folder)
    save_model(loaded, tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    x, t = torch.randn(1, pipe.unet.config.in_channels, 8, 8), torch.tensor([500.0])
    context = torch.randn(1, 5, loaded.spec.unet.context)
    sizes = torch.ones(1, loaded.spec.unet.size_numbers)
    pooled = torch.randn(1, loaded.spec.unet.pooled)
    added = {"text_embeds": pooled, "time_ids": sizes} if loaded.spec.unet.addition else None
    with torch.no_grad():
        theirs = again.unet(x, t, context, added_cond_kwargs=added).sample
        first = pipe.unet(x, t, context, added_cond_kwargs=added).sample
        ours = loaded.networks.unet(x, t, context, *((pooled, sizes) if added else ()))
    torch.testing.assert_close(theirs, first, rtol=1e-5, atol=1e-5)  # elsewhere in memory they may round apart
    for name in ("scaling_factor", "force_upcast"):
        assert again.vae.config[name] == pipe.vae.config[name]
    assert again.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    assert torch.equal(again.scheduler.betas, pipe.scheduler.betas)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            ids = torch.randint(0, 100, (2, 7))
            torch.testing.assert_close(getattr(again, name)(ids)[0], getattr(pipe, name)(ids)[0])
    words = (again.tokenizer or again.tokenizer_2), (pipe.tokenizer or pipe.tokenizer_2)
    assert words[0]("a red cube!", padding="max_length") == words[1]("a red cube!", padding="max_length")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_as_the_same_model(family: Family, tmp_path: Path) -> None:
    model = small_model(family)
    save_model(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same_weights(loaded, model)
    assert loaded.spec == model.spec
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert (tmp_path / "model" / UNET).stat().st_mode & 0o777 == (
        tmp_path / "model" / "model_index.json"
    ).stat().st_mode & 0o777


def test_saving_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    save_model(small_model("sd1"), tmp_path / "model")
    save_model(second := small_model("sd1"), tmp_path / "model")
    assert_same_weights(load(tmp_path / "model"), second)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("do not lose me")
    with pytest.raises(InputError, match="not a model folder"):
        save_model(second, tmp_path / "letters")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "model"]


def test_a_save_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = small_model("sd1")
    monkeypatch.setattr(type(model.tokenizers[0]), "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_a_killed_save_moved_aside_is_found_again(tmp_path: Path) -> None:
    save_model(model := small_model("sd1"), tmp_path / "model")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "model").rename(tmp_path / f".model.{process.pid}.old")  # between the renames, on no Linux
    assert_same_weights(load(tmp_path / "model"), model)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (float("nan"), None, "holds NaN or infinity"),
        (float("inf"), None, "holds NaN or infinity"),
        (1e6, torch.float16, "holds numbers too large for torch.float16; save it in torch.float32"),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, value: float, dtype: torch.dtype | None, said: str
) -> None:
    save_model(good := small_model("sd1"), tmp_path / "model")
    bad = small_model("sd1")
    with torch.no_grad():
        bad.networks.unet.conv_in.weight[0, 0, 0, 0] = value
    with pytest.raises(NotFiniteError, match=f"'conv_in.weight' {said}"):
        save_model(bad, tmp_path / "model", dtype)
    assert_same_weights(load(tmp_path / "model"), good)
    with pytest.raises(NotFiniteError, match=said):
        save_single_file(bad, tmp_path / "model.safetensors", dtype)
    lora = Lora(name="bad", layers={"unet.x": Factors(down=torch.full((1, 2), value), up=torch.ones(2, 1), alpha=1.0)})
    with pytest.raises(NotFiniteError, match=said):
        save_lora(lora, tmp_path / "lora.safetensors", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_in_the_asked_number_format_stay_mapped_and_others_are_converted(copy: Path) -> None:
    whole, half = load(copy), load(copy, torch.bfloat16)
    for ours, theirs in zip(networks(half).values(), networks(whole).values(), strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.equal(a, b.bfloat16())


def test_the_half_precision_variant_is_read_when_half_is_asked_or_nothing_else_is_there(copy: Path) -> None:
    path = copy / UNET
    variant = path.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(path, variant)
    rewrite(variant, lambda tensors: {name: (tensor + 1).half() for name, tensor in tensors.items()})
    bias = load_file(path)["conv_in.bias"]
    assert torch.equal(load(copy).networks.unet.conv_in.bias, bias)
    assert torch.equal(load(copy, torch.float16).networks.unet.conv_in.bias, (bias + 1).half())
    path.unlink()
    assert torch.equal(load(copy).networks.unet.conv_in.bias, (bias + 1).half().float())


def test_shards_load_as_one_file(oracle: Oracle, copy: Path) -> None:
    pipe, folder = oracle("sd1")
    shutil.rmtree(copy / "unet")
    pipe.unet.save_pretrained(copy / "unet", max_shard_size="1MB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 1
    assert_same_weights(load(copy), load(folder))
    next((copy / "unet").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(copy)


def test_an_index_may_not_leave_its_folder(copy: Path) -> None:
    (copy / UNET).unlink()
    index = copy / f"{UNET}.index.json"
    for name in ("../vae/x.safetensors", "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(CheckpointError, match="beside it"):
            load(copy)


def test_pickled_parts_load(oracle: Oracle, copy: Path) -> None:
    torch.save(load_file(copy / UNET), (copy / UNET).with_suffix(".bin"))
    torch.save(load_file(copy / TEXT), copy / "text_encoder/pytorch_model.bin")
    (copy / UNET).unlink()
    (copy / TEXT).unlink()
    assert_same_weights(load(copy), load(oracle("sd1")[1]))


def test_text_towers_load_with_and_without_their_prefix_and_with_position_ids(oracle: Oracle, copy: Path) -> None:
    bare = {name.removeprefix("text_model.") for name in load_file(copy / TEXT)}

    def published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        long = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        return long | {"text_model.embeddings.position_ids": torch.arange(16)[None]}

    rewrite(copy / TEXT, published)
    assert_same_weights(load(copy), load(oracle("sd1")[1]))
    rewrite(copy / TEXT, lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()})
    assert bare <= set(load_file(copy / TEXT))
    assert_same_weights(load(copy), load(oracle("sd1")[1]))


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_autoencoders_load(oracle: Oracle, copy: Path, convolutions: bool) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for new, past in names.items():
                if f"attentions.0.{new}." in name:
                    name = name.replace(f".{new}.", f".{past}.")
                    tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
            renamed[name] = tensor
        return renamed

    rewrite(copy / "vae/diffusion_pytorch_model.safetensors", old)
    assert_same_weights(load(copy), load(oracle("sd1")[1]))


def test_all_that_does_not_fit_is_told_at_once(copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3]
        tensors["conv_out.bias"] = tensors["conv_out.bias"].long()
        tensors["time_embedding.linear_9.bias"] = torch.zeros(3)
        del tensors["conv_norm_out.weight"], tensors["conv_norm_out.bias"]
        return tensors

    rewrite(copy / UNET, spoil)
    rewrite(copy / TEXT, lambda tensors: dict(list(tensors.items())[5:]))
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    said = str(caught.value)
    for part in (
        "unet",
        "2 missing: conv_norm_out.bias, conv_norm_out.weight",
        "1 of another shape: conv_in.weight: file (32, 3, 3, 3), model (32, 4, 3, 3)",
        "1 not of floating point: conv_out.bias",
        "1 unexpected: time_embedding.linear_9.bias",
        "text_encoder",
        "5 missing",
        "2 more",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "unet/config.json",
            {"block_out_channels": "wide"},
            "block_out_channels is 'wide'",
        ),
        ("unet/config.json", {"block_out_channels": []}, "block_out_channels is "),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("unet/config.json", {"norm_num_groups": 7}, "cannot be built"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is .gelu."),
        ("vae/config.json", {"layers_per_block": -1}, "layers_per_block is -1"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ("text_encoder/config.json", {"hidden_act": "os.system"}, "hidden_act is 'os.system'"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EulerDiscretScheduler"},
            "did you mean 'EulerDiscreteScheduler'",
        ),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("model_index.json", {"vae": [None, None]}, "without vae"),
        ("model_index.json", {"text_encoder": [None, None]}, "without text_encoder"),
        ("model_index.json", {"_fewstep": {"defaults": {"steps": "many"}}}, "'steps' = 'many'"),
    ],
)
def test_configs_are_untrusted(copy: Path, file: str, change: dict[str, Any], said: str) -> None:
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        load(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff\xfe", "[" * 100_000])
def test_broken_json_is_told(copy: Path, text: str) -> None:
    (copy / "unet/config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        load(copy)


def test_folders_that_are_none_are_told(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load(copy / "unet")
    (copy / UNET).unlink()
    with pytest.raises(CheckpointError, match="no file of weights"):
        load(copy)
    with pytest.raises(InputError, match="no file or folder"):
        load(tmp_path / "nowhere")


def test_an_unknown_prediction_or_name_is_told_with_the_nearest(copy: Path) -> None:
    with pytest.raises(InputError, match="unknown prediction 'eps'"):
        load_model(copy, dtype=torch.float32, prediction="eps")
    with pytest.raises(InputError, match="did you mean 'sd-turbo'"):
        load_model("sd-trubo", dtype=torch.float32)
    assert load_model(copy, dtype=torch.float32, prediction="sample").spec.scheduler.prediction == "sample"


def test_a_tiny_autoencoder_loads(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderTiny()
    theirs.save_pretrained(tmp_path / "taesd")
    ours = load_tiny(tmp_path / "taesd", dtype=torch.float32)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "sampler",
    [
        "plms",
        "ddim",
        "ddpm",
        "lcm",
        "euler",
        "euler_ancestral",
        "heun",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "dpmpp_sde",
        "unipc",
    ],
)
def test_every_sampler_survives_a_scheduler_config(sampler: str) -> None:
    config = SchedulerConfig(sampler=sampler, final="zero", zero_terminal_snr=True, spacing="linspace", curve="karras")
    assert SchedulerConfig.from_diffusers(config.to_diffusers()) == config
    trailing = replace(config, spacing=None, curve=None, prediction="v_prediction", final="sigma_min")
    assert SchedulerConfig.from_diffusers(trailing.to_diffusers()) == trailing


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_curve_without_its_ends_is_refused(spacing: str) -> None:
    config = SchedulerConfig(sampler="euler").to_diffusers() | {"use_karras_sigmas": True}
    assert SchedulerConfig.from_diffusers(config).schedule_for("euler") == "karras"
    with pytest.raises(CheckpointError, match=f"use_karras_sigmas with timestep_spacing '{spacing}'"):
        SchedulerConfig.from_diffusers(config | {"timestep_spacing": spacing})
    multistep = config | {"timestep_spacing": spacing, "_class_name": "UniPCMultistepScheduler"}
    assert SchedulerConfig.from_diffusers(multistep).schedule_for("unipc") == "karras"


def test_another_sampler_keeps_the_noise_levels_and_nothing_of_the_old_one() -> None:
    config = SchedulerConfig(sampler="dpmpp_2m", curve="karras", stands_in_for="LMSDiscreteScheduler")
    other = config.sampled_by("euler_ancestral", "trailing")
    assert other.schedule_for("euler") == "trailing"
    assert not other.substitution
    assert other.noise_schedule == config.noise_schedule
    assert SchedulerConfig.from_diffusers(other.to_diffusers()) == other


def test_published_scheduler_configs_are_read_as_their_classes_mean_them() -> None:
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    sd1 = {
        "_class_name": "PNDMScheduler",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
        "trained_betas": None,
    }
    assert SchedulerConfig.from_diffusers(noise | sd1) == SchedulerConfig()
    sdxl = {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "use_karras_sigmas": False,
    }
    assert SchedulerConfig.from_diffusers(noise | sdxl) == SchedulerConfig(
        sampler="euler", spacing="leading", final=None
    )
    turbo = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 1}
    assert SchedulerConfig.from_diffusers(noise | turbo) == SchedulerConfig(
        sampler="euler_ancestral", spacing="trailing", final=None
    )
    with pytest.raises(CheckpointError, match="clip_sample"):
        SchedulerConfig.from_diffusers(noise | {"_class_name": "DDIMScheduler"})
