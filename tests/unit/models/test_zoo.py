"""The catalogue: exact sizes of the published networks, and entries that hold together."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.schedule import SCHEDULES
from fewstep.errors import InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE, Entry, entry
from fewstep.weights.load import load_model

UNETS = {
    "sd-v1-4": 859_520_964,
    "small-sd": 579_384_964,
    "sd-v2-1": 865_910_724,
    "sd-turbo": 865_910_724,
    "sdxl-base": 2_567_463_684,
    "sdxl-turbo": 2_567_463_684,
    "sdxl-refiner": 2_259_526_660,
}
CLIP_L, OPENCLIP_H, OPENCLIP_G = 123_060_480, 340_387_840, 694_659_840
TEXTS = {
    "sd-v1-4": [CLIP_L],
    "small-sd": [CLIP_L],
    "sd-v2-1": [OPENCLIP_H],
    "sd-turbo": [OPENCLIP_H],
    "sdxl-base": [CLIP_L, OPENCLIP_G],
    "sdxl-turbo": [CLIP_L, OPENCLIP_G],
    "sdxl-refiner": [OPENCLIP_G],
}
ENTRIES = pytest.mark.parametrize("known", CATALOGUE.values(), ids=CATALOGUE)


def size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", UNETS)
def test_the_networks_have_exactly_the_published_number_of_parameters(name: str) -> None:
    known = entry(name)
    assert known.unet is not None
    assert known.autoencoder is not None
    with torch.device("meta"):
        assert size(UNet(known.unet)) == UNETS[name]
        assert size(AutoencoderKL(known.autoencoder)) == 83_653_863
        assert [size(TextEncoder(config)) for config in known.texts] == TEXTS[name]


def test_the_tiny_autoencoder_has_exactly_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert size(TinyAutoencoder()) == 2_445_063


@ENTRIES
def test_an_entry_holds_together(known: Entry) -> None:
    assert CATALOGUE[known.name] is known
    assert known.source is None or [each.source for each in CATALOGUE.values()].count(known.source) == 1
    assert known.licence
    assert known.terms
    if known.defaults is not None:
        assert known.defaults.schedule in (None, *SCHEDULES)
        assert known.defaults.width % 64 == known.defaults.height % 64 == 0
    if known.source is None:
        assert known.base is None or entry(known.base).base is None
    elif known.family != "tiny":
        assert known.unet is not None
        assert known.unet.context == sum(config.width for config in known.texts)
        assert known.unet.pooled in (0, known.texts[-1].projection)
        assert UNetConfig.from_diffusers(known.unet.to_diffusers(64)) == known.unet
        assert [TextConfig.from_transformers(c.to_transformers()) for c in known.texts] == list(known.texts)


def test_turbo_models_draw_in_one_step_without_guidance() -> None:
    for name in ("sd-turbo", "sdxl-turbo"):
        defaults = entry(name).defaults
        assert defaults is not None
        assert (defaults.steps, defaults.guidance_scale, defaults.schedule) == (1, 0.0, "trailing")


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown model 'sdxl-trubo'; did you mean 'sdxl-turbo'"):
        entry("sdxl-trubo")


def test_a_decoder_alone_is_no_model_to_draw_with() -> None:
    with pytest.raises(InputError, match="taesd is a decoder alone"):
        load_model("taesd", dtype=torch.float32)
