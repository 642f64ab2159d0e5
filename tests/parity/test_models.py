"""The networks against diffusers and transformers: same weights, same inputs, one forward pass.

The full-size architectures are marked `slow`: random weights, up to 11 GB, some minutes each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE
from tests import oracles

UNETS = ("sd-v1-4", "small-sd", "sd-v2-1", "sdxl-base", "sdxl-refiner")
slow = pytest.mark.slow


def holding(module: Callable[[], nn.Module], weights: dict[str, Tensor]) -> Any:
    """Our module around the oracle's own tensors: nothing is copied."""
    with torch.device("meta"):
        ours = module()
    ours.load_state_dict(weights, assign=True)
    return ours.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def random_(model: nn.Module, seed: int = 0) -> Any:
    """Fresh weights of a size that keeps activations near one, biases included: nothing may cancel unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
            else:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def unet_error(config: UNetConfig, side: tuple[int, int], rows: int = 1) -> float:
    theirs = diffusers.UNet2DConditionModel.from_config(config.to_diffusers(64))
    theirs.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    ours = holding(lambda: UNet(config), random_(theirs).state_dict())
    x, t = torch.randn(rows, config.in_channels, *side), torch.tensor([501.0, 3.0][:rows])
    context = torch.randn(rows, 77, config.context)
    pooled, sizes = None, None
    added = None
    if config.addition:
        pooled = torch.randn(rows, config.pooled)
        sizes = torch.tensor([[1024.0, 768, 0, 64, 1024, 768][: config.size_numbers]] * rows)
        added = {"text_embeds": pooled, "time_ids": sizes}
    wanted = theirs(x, t, context, added_cond_kwargs=added).sample
    return relative(ours(x, t, context, pooled, sizes), wanted)


@slow
@pytest.mark.parametrize("name", UNETS)
def test_full_size_unet(name: str, record_property: Callable[[str, Any], None]) -> None:
    config = CATALOGUE[name].unet
    assert config is not None
    error = unet_error(config, (16, 24))
    record_property("error", error)
    print(f"{name} UNet: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("side", [(8, 8), (9, 13)])
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_unet(kind: str, side: tuple[int, int], tmp_path: Any) -> None:
    config = UNetConfig.from_diffusers(oracles.pipeline(kind, tmp_path).unet.config)
    assert unet_error(config, side, rows=2) <= 1e-4


@torch.no_grad()
def autoencoder_error(config: AutoencoderConfig, side: int) -> tuple[float, float]:
    theirs = random_(diffusers.AutoencoderKL.from_config(config.to_diffusers(512)))
    ours = holding(lambda: AutoencoderKL(config), theirs.state_dict())
    image = torch.randn(1, 3, side, 2 * side)
    latents = torch.randn(1, config.latent_channels, side // config.factor, side // config.factor)
    encoded = theirs.encode(image).latent_dist.parameters
    return relative(ours.encode(image), encoded), relative(ours.decode(latents), theirs.decode(latents).sample)


def test_autoencoder() -> None:
    config = AutoencoderConfig(channels=(16, 32, 32, 32), resnets=1, groups=8)
    assert max(autoencoder_error(config, 32)) <= 1e-4


@slow
def test_full_size_autoencoder() -> None:
    errors = autoencoder_error(AutoencoderConfig(), 128)
    print(f"KL autoencoder: encode {errors[0]:.1e}, decode {errors[1]:.1e}")
    assert max(errors) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 16])
def test_tiny_autoencoder(width: int) -> None:
    widths = [width] * 4
    theirs = random_(diffusers.AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths))
    ours = holding(lambda: TinyAutoencoder(width), theirs.state_dict())
    image, latents = torch.rand(1, 3, 64, 32) * 2 - 1, 3 * torch.randn(1, 4, 8, 4)
    assert relative(ours.encode(image), theirs.encode(image).latents) <= 1e-4
    assert relative(ours.decode(latents), theirs.decode(latents).sample) <= 1e-4


@torch.no_grad()
def text_error(config: TextConfig) -> float:
    name = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    settings = transformers.CLIPTextConfig(**config.to_transformers())
    theirs = random_(getattr(transformers, name)(settings))
    weights = theirs.state_dict()
    if "embeddings.token_embedding.weight" in weights:
        weights = {f"text_model.{key}": value for key, value in weights.items()}
    ours = holding(lambda: TextEncoder(config), weights)
    ids = torch.randint(0, config.eos - 1, (2, config.window))
    ids[0, 5:], ids[1, -1] = config.eos, config.eos
    wanted, states = theirs(ids, output_hidden_states=True), ours(ids)
    pooled = wanted.text_embeds if config.projection else wanted.pooler_output
    errors = [relative(states.last, wanted.last_hidden_state), relative(states.pooled, pooled)]
    return max(*errors, relative(states.penultimate, wanted.hidden_states[-2]))


@pytest.mark.parametrize("projection", [None, 24])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder(activation: Any, projection: int | None) -> None:
    shape = {"vocabulary": 99, "window": 16, "width": 32, "layers": 3, "heads": 2, "inner": 64, "eos": 98}
    assert text_error(TextConfig(**shape, activation=activation, projection=projection)) <= 1e-4


@slow
@pytest.mark.parametrize(("name", "tower"), [("sd-v1-4", 0), ("sd-v2-1", 0), ("sdxl-base", 1)])
def test_full_size_text_encoder(name: str, tower: int) -> None:
    error = text_error(CATALOGUE[name].texts[tower])
    print(f"{name} text tower {tower + 1}: {error:.1e}")
    assert error <= 1e-4
