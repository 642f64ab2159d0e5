"""No setting that changes the picture is dropped: it is refused, or what comes out is that of diffusers.

For every key in the signatures of diffusers' schedulers, UNet and autoencoders and of transformers' text tower: other
values than the usual one are put into a config; then either reading it raises a CheckpointError that names the key, or
both sides give the same.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fewstep.diffusion.denoiser import consistency, denoiser
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import sigmas_for
from fewstep.errors import CheckpointError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig, tiny_width
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.weights.scheduler import SchedulerConfig
from tests import oracles

SHAPE = (1, 4, 4, 4)
USUAL = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
SCHEDULER_CHANGES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (500,),
    "beta_start": (0.002,),
    "beta_end": (0.02,),
    "beta_schedule": ("linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"),
    "trained_betas": ([0.001 + 0.00001 * i for i in range(1000)],),
    "clip_sample": (True,),
    "set_alpha_to_one": (True, False),
    "steps_offset": (0, 3),
    "prediction_type": ("v_prediction", "sample", "flow_prediction"),
    "thresholding": (True,),
    "dynamic_thresholding_ratio": (0.5,),
    "clip_sample_range": (0.3,),
    "sample_max_value": (0.5,),
    "timestep_spacing": ("leading", "trailing", "linspace", "uniform"),
    "rescale_betas_zero_snr": (True,),
    "variance_type": ("fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "fixed_small"),
    "skip_prk_steps": (False,),
    "solver_order": (1, 3),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("heun", "bh1", "bh2", "midpoint", "logrho"),
    "lower_order_final": (False,),
    "euler_at_final": (True,),
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,),
    "use_beta_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "use_flow_sigmas": (True,),
    "flow_shift": (3.0,),
    "final_sigmas_type": ("sigma_min",),
    "lambda_min_clipped": (-1.0,),
    "use_dynamic_shifting": (True,),
    "time_shift_type": ("linear",),
    "interpolation_type": ("log_linear",),
    "sigma_min": (0.1,),
    "sigma_max": (5.0,),
    "timestep_type": ("continuous",),
    "original_inference_steps": (25,),
    "timestep_scaling": (3.0,),
    "predict_x0": (False,),
    "disable_corrector": ([0, 1, 2],),
    "solver_p": ("x",),
    "shift_terminal": (0.1,),
}
UNLIKE = {
    ("PNDMScheduler", "prediction_type"): "diffusers mixes past outputs as if they were noises",
    (
        "PNDMScheduler",
        "steps_offset",
    ): "levels fall strictly here, so a last time step at the lowest level is moved to 1",
    ("PNDMScheduler", "timestep_spacing"): "diffusers steps by 1000 // steps whatever it visits",
    ("DDIMScheduler", "timestep_spacing"): "likewise",
    ("PNDMScheduler", "rescale_betas_zero_snr"): "this class does not read what the model was trained with",
    ("HeunDiscreteScheduler", "rescale_betas_zero_snr"): "likewise",
    ("DDIMScheduler", "rescale_betas_zero_snr"): "diffusers reaches sigma = infinity; compared in test_samplers.py",
    ("DDPMScheduler", "rescale_betas_zero_snr"): "likewise",
    ("LCMScheduler", "rescale_betas_zero_snr"): "likewise",
}
"""Settings that are heeded, whose pictures differ for a reason of diffusers': see also test_samplers.py."""


def parameters(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]


def in_json(config: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return value


def refused(key: str, read: Callable[[], Any]) -> bool:
    """Whether reading the config is refused, and by the name of the setting."""
    try:
        read()
    except CheckpointError as error:
        message = str(error)
    else:
        return False
    assert key in message or key.endswith("block_types"), message
    return True


def predict(x: Tensor, t: Any) -> Tensor:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) / 8
    return torch.tanh(x.flatten(1) @ weight + float(t) / 1000).reshape(x.shape) + 0.2 * x


def noise(seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def last_x_of_diffusers(name: str, config: dict[str, Any], steps: int, *, random: bool) -> Tensor:
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    options = {"generator": torch.Generator().manual_seed(11)} if random else {}
    x = noise(5)() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


def last_x(own: SchedulerConfig, steps: int) -> Tensor:
    name, spec = own.sampler, SAMPLERS[own.sampler]
    schedule = own.schedule_for(name)
    levels: dict[str, Any] = {
        "steps_offset": own.steps_offset,
        "final": own.final_for(name),
        "convention": spec.convention,
    }
    sigmas = sigmas_for(schedule, steps, own.noise_schedule, **levels)
    denoise = denoiser(predict, own.noise_schedule, own.prediction)
    if spec.consistency:
        denoise = consistency(denoise, own.noise_schedule)
    x = noise(5)() * spec.initial_scale(schedule, sigmas[0])
    *_, last = spec(denoise, x, sigmas, noise=noise(11), eta=0.0 if name == "ddim" else None)
    return last.x / (1 + last.sigma**2) ** 0.5


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_every_setting_of_the_schedulers_is_tried() -> None:
    known = {name for kind in CLASSES for name in parameters(getattr(diffusers, kind))}
    assert known <= SCHEDULER_CHANGES.keys()


@pytest.mark.parametrize("steps", [5, 20])  # some settings act on runs of less than 15 steps
@pytest.mark.parametrize("key", SCHEDULER_CHANGES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_scheduler_setting_is_refused_or_heeded(name: str, key: str, steps: int) -> None:
    for value in SCHEDULER_CHANGES[key]:
        config = {"_class_name": name, **USUAL, key: value}
        if refused(key, partial(SchedulerConfig.from_diffusers, in_json(config))) or (name, key) in UNLIKE:
            continue
        own = SchedulerConfig.from_diffusers(in_json(config))
        if (name, value) == ("EulerAncestralDiscreteScheduler", "sample"):
            continue  # which that class does not implement
        theirs = last_x_of_diffusers(name, config, steps, random=SAMPLERS[own.sampler].takes_noise)
        # the multistep classes round the time steps of curves before they ask the model
        curved = key in ("use_karras_sigmas", "use_exponential_sigmas")
        limit = 1e-2 if curved and SAMPLERS[own.sampler].convention == "multistep" else 1e-4
        assert difference(last_x(own, steps), theirs) < limit, (key, value)


PUBLISHED_SPACINGS = {
    "sd-v1-4": ("PNDMScheduler", {"set_alpha_to_one": False}),
    "sd-turbo": ("EulerDiscreteScheduler", {"set_alpha_to_one": False, "timestep_spacing": "trailing"}),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
}


@pytest.mark.parametrize("steps", [4, 12])
@pytest.mark.parametrize("model", PUBLISHED_SPACINGS)
def test_consistency_models_visit_their_own_steps_whatever_spacing_a_file_names(model: str, steps: int) -> None:
    name, more = PUBLISHED_SPACINGS[model]
    own = SchedulerConfig.from_diffusers({"_class_name": name, **USUAL, **more})
    theirs = last_x_of_diffusers("LCMScheduler", {**USUAL, **more}, steps, random=True)
    assert difference(last_x(replace(own, sampler="lcm"), steps), theirs) < 1e-4


UNET_CHANGES: dict[str, tuple[Any, ...]] = {
    "sample_size": (16,),
    "in_channels": (9, 8, 5),
    "out_channels": (8,),
    "center_input_sample": (True,),
    "flip_sin_to_cos": (False,),
    "freq_shift": (1,),
    "down_block_types": (
        ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        ("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    ),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None),
    "up_block_types": (("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),),
    "only_cross_attention": (True, (False, False, False)),
    "block_out_channels": ((32, 32, 64),),
    "layers_per_block": (2, (1, 2, 1)),
    "downsample_padding": (0,),
    "mid_block_scale_factor": (2,),
    "dropout": (0.5,),
    "act_fn": ("gelu", "swish", "mish"),
    "norm_num_groups": (4, 16),
    "norm_eps": (1e-3,),
    "cross_attention_dim": (48,),
    "transformer_layers_per_block": (2, (1, 2, 1)),
    "reverse_transformer_layers_per_block": ((1, 1, 1),),
    "encoder_hid_dim": (24,),
    "encoder_hid_dim_type": ("text_proj",),
    "attention_head_dim": (4, (2, 4, 8)),
    "num_attention_heads": (4,),
    "dual_cross_attention": (True,),
    "use_linear_projection": (True,),
    "class_embed_type": ("timestep", "identity"),
    "addition_embed_type": ("text",),
    "addition_time_embed_dim": (8,),
    "num_class_embeds": (10,),
    "upcast_attention": (True,),
    "resnet_time_scale_shift": ("scale_shift",),
    "resnet_skip_time_act": (True,),
    "resnet_out_scale_factor": (2.0,),
    "time_embedding_type": ("fourier",),
    "time_embedding_dim": (64,),
    "time_embedding_act_fn": ("silu",),
    "timestep_post_act": ("silu",),
    "time_cond_proj_dim": (16,),
    "conv_in_kernel": (5,),
    "conv_out_kernel": (5,),
    "projection_class_embeddings_input_dim": (32,),
    "attention_type": ("gated",),
    "class_embeddings_concat": (True,),
    "mid_block_only_cross_attention": (True, False),
    "cross_attention_norm": ("layer_norm",),
    "addition_embed_type_num_heads": (32,),
}
VAE_CHANGES: dict[str, tuple[Any, ...]] = {
    "in_channels": (1,),
    "out_channels": (1,),
    "down_block_types": (("AttnDownEncoderBlock2D",) * 4,),
    "up_block_types": (("AttnUpDecoderBlock2D",) * 4,),
    "block_out_channels": ((16, 16, 16, 16),),
    "layers_per_block": (2,),
    "act_fn": ("gelu", "swish"),
    "latent_channels": (8,),
    "norm_num_groups": (4,),
    "sample_size": (32,),
    "scaling_factor": (0.5,),
    "shift_factor": (0.1,),
    "latents_mean": ([0.1] * 4,),
    "latents_std": ([0.5] * 4,),
    "force_upcast": (False,),
    "use_quant_conv": (False,),
    "use_post_quant_conv": (False,),
    "mid_block_add_attention": (False,),
}
TINY_CHANGES: dict[str, tuple[Any, ...]] = {
    "in_channels": (1,),
    "out_channels": (1,),
    "encoder_block_out_channels": ((32, 32, 32, 32), (64, 64, 64, 32)),
    "decoder_block_out_channels": ((64, 64, 64, 32),),
    "act_fn": ("silu",),
    "upsample_fn": ("bilinear",),
    "latent_channels": (16,),
    "upsampling_scaling_factor": (4,),
    "num_encoder_blocks": ((1, 1, 1, 1),),
    "num_decoder_blocks": ((1, 1, 1, 1),),
    "latent_magnitude": (2,),
    "latent_shift": (0.4,),
    "force_upcast": (True,),
    "scaling_factor": (2.0,),
    "shift_factor": (0.5,),
}
TEXT_CHANGES: dict[str, tuple[Any, ...]] = {
    "vocab_size": (150,),
    "hidden_size": (64,),
    "intermediate_size": (48,),
    "projection_dim": (16,),
    "num_hidden_layers": (2,),
    "num_attention_heads": (4,),
    "max_position_embeddings": (20,),
    "hidden_act": ("gelu", "relu", "gelu_new"),
    "layer_norm_eps": (1e-3,),
    "attention_dropout": (0.5,),
    "initializer_range": (0.1,),
    "initializer_factor": (2.0,),
    "pad_token_id": (0,),
    "bos_token_id": (5,),
    "eos_token_id": (7,),
}


def test_every_setting_of_the_networks_is_tried() -> None:
    assert set(parameters(diffusers.UNet2DConditionModel)) == UNET_CHANGES.keys()
    assert set(parameters(diffusers.AutoencoderKL)) == VAE_CHANGES.keys()
    assert set(parameters(diffusers.AutoencoderTiny)) == TINY_CHANGES.keys()
    general = set(CLIPTextConfig.mro()[1]().to_dict())
    assert set(CLIPTextConfig().to_dict()) - general - {"model_type"} <= TEXT_CHANGES.keys()


def changes(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}-{value}") for key, values in table.items() for value in values]


@torch.no_grad()
@pytest.mark.parametrize(("key", "value"), changes(UNET_CHANGES))
def test_a_setting_of_the_unet_is_refused_or_heeded(key: str, value: Any) -> None:
    torch.manual_seed(0)
    usual = in_json(oracles.unet().config)
    if refused(key, lambda: UNetConfig.from_diffusers(usual | {key: in_json({"": value})[""]})):
        return
    more = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")} if key == "down_block_types" else {}
    try:
        theirs = oracles.unet(**{key: value, **more})
    except ValueError:
        return  # diffusers refuses it too
    config = UNetConfig.from_diffusers(in_json(theirs.config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, context = (
        torch.randn(2, config.in_channels, 8, 8),
        torch.tensor([40.0, 700.0]),
        torch.randn(2, 5, config.context),
    )
    assert difference(ours(x, t, context), theirs(x, t, context).sample) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("key", "value"), changes(VAE_CHANGES))
def test_a_setting_of_the_autoencoder_is_refused_or_heeded(key: str, value: Any) -> None:
    torch.manual_seed(0)
    usual = in_json(oracles.vae().config)
    if refused(key, lambda: AutoencoderConfig.from_diffusers(usual | {key: in_json({"": value})[""]})):
        return
    theirs = diffusers.AutoencoderKL(**{**oracles.vae().config, key: value}).eval()
    config = AutoencoderConfig.from_diffusers(in_json(theirs.config))
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(theirs.state_dict())
    latents = torch.randn(1, config.latent_channels, 4, 4)
    assert difference(ours.decode(latents), theirs.decode(latents).sample) < 1e-4
    assert config.scaling_factor == theirs.config.scaling_factor
    assert config.force_upcast == theirs.config.force_upcast


@pytest.mark.parametrize(("key", "value"), changes(TINY_CHANGES))
def test_a_setting_of_the_tiny_autoencoder_is_refused_or_harmless(key: str, value: Any) -> None:
    config = in_json(diffusers.AutoencoderTiny().config) | {key: in_json({"": value})[""]}
    assert refused(key, lambda: tiny_width(config)) or key == "force_upcast"
    assert tiny_width({f"{side}_block_out_channels": [16] * 4 for side in ("encoder", "decoder")}) == 16


@torch.no_grad()
@pytest.mark.parametrize(("key", "value"), changes(TEXT_CHANGES))
def test_a_setting_of_the_text_encoder_is_refused_or_heeded(key: str, value: Any) -> None:
    torch.manual_seed(0)
    usual = oracles.text_encoder(100, 32, projection=24).config.to_dict()
    usual["architectures"] = ["CLIPTextModelWithProjection"]
    changed = {**usual, key: value}
    if refused(key, lambda: TextConfig.from_transformers(in_json(changed))):
        return
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**changed)).eval()
    ours = TextEncoder(TextConfig.from_transformers(in_json(changed))).eval()
    ours.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if "position_ids" not in name})
    ids = torch.tensor([[98, 3, 4, 99, 7, 99], [98, 7, 99, 5, 6, 99]])
    wanted = theirs(ids, output_hidden_states=True)
    states = ours(ids)
    assert difference(states.last, wanted.last_hidden_state) < 1e-4
    assert difference(states.penultimate, wanted.hidden_states[-2]) < 1e-4
    assert difference(states.pooled, wanted.text_embeds) < 1e-4


SAVED = (*CLASSES, *(f"{name}Scheduler" for name in ("DEISMultistep", "DPMSolverSinglestep", "LMSDiscrete")))


@pytest.mark.parametrize("name", [*SAVED, "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_what_a_scheduler_of_diffusers_saves_of_itself_loads(name: str) -> None:
    saved = json.loads(getattr(diffusers, name).from_config(USUAL).to_json_string())
    assert SchedulerConfig.from_diffusers(saved).steps_offset == 1


@torch.no_grad()
@pytest.mark.parametrize("stated", [2, 49407])
def test_the_pooled_text_is_read_at_the_end_token_where_tokens_were_added(stated: int) -> None:
    """Files say 2 for CLIP's end token, 49407; transformers then takes the highest id, which an added token has."""
    settings = {"vocab_size": 49410, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": 12}
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**settings, eos_token_id=49407)).eval()
    architectures = {"architectures": ["CLIPTextModelWithProjection"]}
    ours = TextEncoder(TextConfig.from_transformers({**settings, **architectures, "eos_token_id": stated})).eval()
    ours.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if "position_ids" not in name})
    prompts = torch.tensor([[49406, 320, 49409, 5, 49407, 49407], [49406, 7, 8, 49407, 0, 0]])
    assert difference(ours(prompts).pooled, theirs(prompts).text_embeds) < 1e-5
    assert ours(prompts).pooled[0].sub(ours(prompts).pooled[1]).abs().max() > 1e-3
