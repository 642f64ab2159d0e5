"""Small models of every family, made by fewstep itself, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.model import LoadedModel, ModelSpec
from fewstep.weights.scheduler import usual_scheduler

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl", "sdxl-refiner")
SOME_LETTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def tokenizer() -> Tokenizer:
    words = [*SOME_LETTERS, *(letter + "</w>" for letter in SOME_LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return Tokenizer.from_vocabulary({word: i for i, word in enumerate(words)}, [])


def unet_config(family: Family, **changes: Any) -> UNetConfig:
    """Of the family's kind, with heads as its single files imply them."""
    heads = (8, 8) if family == "sd1" else (1, 2)
    depths = {"sd1": (1, 0), "sd2": (1, 0), "sdxl": (0, 2), "sdxl-refiner": (0, 1)}[family]
    stages = tuple(
        Stage(channels=c, depth=d, heads=h, resnets=2) for c, d, h in zip((64, 128), depths, heads, strict=True)
    )
    settings: dict[str, Any] = {"context": 64, "linear_projection": family != "sd1"}
    if family == "sdxl":
        settings |= {"addition": 64 + 6 * 256, "context": 64 + 128, "mid_depth": 2}
    if family == "sdxl-refiner":
        settings |= {"addition": 64 + 5 * 256}
    return UNetConfig(**({"stages": stages} | settings | changes))


def text_configs(family: Family) -> tuple[TextConfig, ...]:
    shape: dict[str, Any] = {"vocabulary": len(tokenizer()), "layers": 3}
    clip = TextConfig(**shape, width=128 if family == "sdxl" else 64, heads=2 if family == "sdxl" else 1, inner=96)
    projection = 64 if family.startswith("sdxl") else None
    open_clip = TextConfig(**shape, width=64, heads=1, inner=96, activation="gelu", projection=projection)
    configs = [clip, open_clip]
    towers = {"sd1": configs[:1], "sd2": configs[1:], "sdxl": configs, "sdxl-refiner": configs[1:]}[family]
    eos = len(tokenizer()) - 1
    return tuple(TextConfig(**{**vars(tower), "eos": eos}) for tower in towers)


def autoencoder_config(family: Family) -> AutoencoderConfig:
    xl = family.startswith("sdxl")
    return AutoencoderConfig(channels=(32, 64), resnets=1, scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl)


def small_model(family: Family, **changes: Any) -> LoadedModel:
    scheduler = usual_scheduler(family, "v_prediction" if family == "sd2" else "epsilon")
    texts = text_configs(family)
    networks = Networks(
        unet=UNet(unet_config(family, **changes)),
        autoencoder=AutoencoderKL(autoencoder_config(family)),
        text_encoders=tuple(TextEncoder(config) for config in texts),
    )
    spec = ModelSpec(
        name=f"a tiny {family}",
        family=family,
        unet=networks.unet.config,
        autoencoder=networks.autoencoder.config,
        texts=texts,
        scheduler=scheduler,
        defaults=Defaults(steps=3, guidance_scale=2.0, sampler="euler", schedule="trailing", width=128, height=128),
        licence="none",
        force_zeros_for_empty_prompt=family == "sdxl",
    )
    return LoadedModel(spec, tuple(tokenizer() for _ in texts), networks)


def networks(loaded: LoadedModel) -> dict[str, torch.nn.Module]:
    towers = {f"text {i}": tower for i, tower in enumerate(loaded.networks.text_encoders)}
    return {"unet": loaded.networks.unet, "autoencoder": loaded.networks.autoencoder, **towers}


def assert_same_weights(ours: LoadedModel, theirs: LoadedModel) -> None:
    """Every parameter equal to the last bit, and every config."""
    mine, yours = networks(ours), networks(theirs)
    assert mine.keys() == yours.keys()
    for name, network in mine.items():
        assert network.config == yours[name].config
        state = yours[name].state_dict()
        assert network.state_dict().keys() == state.keys()
        assert [key for key, value in network.state_dict().items() if not torch.equal(value, state[key])] == []
