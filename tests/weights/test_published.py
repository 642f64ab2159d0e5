"""The published configs of the family's models load, as the shapes that the catalogue holds."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.models.zoo import CATALOGUE
from fewstep.weights.scheduler import SchedulerConfig, usual_scheduler

Settings = dict[str, Any]

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
BETAS = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
OLD_SCHEDULER = BETAS | {
    "_diffusers_version": "0.8.0",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
EULER = OLD_SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SCHEDULERS: dict[str, Settings] = {
    "sd-v1-4": OLD_SCHEDULER | {"_class_name": "PNDMScheduler"},
    "sd-v2-1": OLD_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sd-turbo": EULER | {"timestep_spacing": "trailing", "timestep_type": "discrete"},
    "sdxl-base": EULER,
    "sdxl-refiner": EULER,
    "sdxl-turbo": EULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "small-sd": OLD_SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
    "a merge with an LCM LoRA": OLD_SCHEDULER
    | {
        "_class_name": "LCMScheduler",
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
    "a merge with DPM-Solver": OLD_SCHEDULER
    | {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": True,
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "lambda_min_clipped": float("-inf"),
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "timestep_spacing": "leading",
        "use_karras_sigmas": True,
        "use_lu_lambdas": False,
        "variance_type": None,
    },
}
"""scheduler/scheduler_config.json"""
READ_AS = {
    "sd-v1-4": ("plms", "leading", "linspace"),
    "sd-v2-1": ("ddim", "leading", "linspace"),
    "sd-turbo": ("euler", "trailing", "trailing"),
    "sdxl-base": ("euler", "leading", "leading"),
    "sdxl-refiner": ("euler", "leading", "leading"),
    "sdxl-turbo": ("euler_ancestral", "trailing", "trailing"),
    "small-sd": ("plms", "leading", "linspace"),
    "a merge with an LCM LoRA": ("lcm", "leading", "leading"),
    "a merge with DPM-Solver": ("dpmpp_2m", "karras", "karras"),
}
"""The sampler, its schedule, and the schedule of Euler."""


def unet(channels: list[int], heads: Any, context: int, **more: Any) -> Settings:
    downs = more.pop("downs", [*[CROSS] * (len(channels) - 1), PLAIN])
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": context,
        "down_block_types": downs,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(downs)],
    } | more


NEWER = {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
    "use_linear_projection": True,
}
SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SD2 = unet([320, 640, 1280, 1280], [5, 10, 20, 20], 1024, sample_size=96, **(NEWER | {"upcast_attention": True}))
SDXL = NEWER | SIZES | {"projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10]}
REFINER = NEWER | SIZES | {"projection_class_embeddings_input_dim": 2560, "transformer_layers_per_block": 4}
UNETS: dict[str, Settings] = {
    "sd-v1-4": unet([320, 640, 1280, 1280], 8, 768),
    "small-sd": unet([320, 640, 1280, 1280], 8, 768, layers_per_block=1),
    "sd-v2-1": SD2,
    "sd-turbo": SD2 | {"sample_size": 64, "attention_type": "default", "dropout": 0.0},
    "sdxl-base": unet([320, 640, 1280], [5, 10, 20], 2048, downs=[PLAIN, CROSS, CROSS], sample_size=128, **SDXL),
    "sdxl-turbo": unet([320, 640, 1280], [5, 10, 20], 2048, downs=[PLAIN, CROSS, CROSS], **SDXL),
    "sdxl-refiner": unet(
        [384, 768, 1536, 1536], [6, 12, 24, 24], 1280, downs=[PLAIN, CROSS, CROSS, PLAIN], sample_size=128, **REFINER
    ),
}
"""unet/config.json"""

VAE: Settings = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP: Settings = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
OPENCLIP_H = CLIP | {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
OPENCLIP_H |= {"num_hidden_layers": 23, "projection_dim": 512}
OPENCLIP_G = CLIP | {"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
OPENCLIP_G |= {"num_hidden_layers": 32, "projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]}
TEXTS: dict[str, list[Settings]] = {
    "sd-v1-4": [CLIP],
    "sd-v2-1": [OPENCLIP_H],
    "sdxl-base": [CLIP, OPENCLIP_G],
    "sdxl-refiner": [OPENCLIP_G],
}
"""text_encoder/config.json and text_encoder_2/config.json"""


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_published_scheduler_loads_with_its_schedules(name: str) -> None:
    config = SchedulerConfig.from_diffusers(SCHEDULERS[name])
    assert (config.sampler, config.schedule_for(config.sampler), config.schedule_for("euler")) == READ_AS[name]
    assert config.steps_offset == 1
    assert (config.beta_start, config.beta_end, config.train_steps) == (0.00085, 0.012, 1000)
    assert config.prediction == ("v_prediction" if name == "sd-v2-1" else "epsilon")
    known = CATALOGUE.get(name)
    if known is not None and known.defaults is not None:
        assert known.defaults.sampler == config.sampler
        assert (known.defaults.schedule or config.schedule_for(config.sampler)) == READ_AS[name][1]


@pytest.mark.parametrize("name", ["sd-v1-4", "sd-v2-1", "sdxl-base", "sdxl-refiner"])
def test_single_files_which_say_nothing_count_as_the_published_models(name: str) -> None:
    config = SchedulerConfig.from_diffusers(SCHEDULERS[name])
    assert usual_scheduler(CATALOGUE[name].family, config.prediction) == config


@pytest.mark.parametrize("name", UNETS)
def test_a_published_unet_loads_as_the_catalogues(name: str) -> None:
    assert UNetConfig.from_diffusers(UNETS[name]) == CATALOGUE[name].unet


def test_the_published_autoencoders_load_as_the_catalogues() -> None:
    old = AutoencoderConfig.from_diffusers(VAE | {"force_upcast": False})
    assert old == CATALOGUE["sd-v1-4"].autoencoder
    newer = {"force_upcast": True, "latents_mean": None, "latents_std": None, "scaling_factor": 0.13025}
    assert AutoencoderConfig.from_diffusers(VAE | newer) == CATALOGUE["sdxl-base"].autoencoder


@pytest.mark.parametrize("name", TEXTS)
def test_published_text_encoders_load_as_the_catalogues(name: str) -> None:
    assert tuple(map(TextConfig.from_transformers, TEXTS[name])) == CATALOGUE[name].texts
