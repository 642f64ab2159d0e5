"""The catalogue: the models that fewstep knows by name, with their shapes, defaults and licences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fewstep.errors import InputError, quoted, unknown
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner", "tiny", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a task uses when it is not told: names of `diffusion`'s samplers and schedules, sizes in pixels.

    `schedule` None: the checkpoint's own for the sampler.
    """

    steps: int = 50
    guidance_scale: float
    sampler: str
    schedule: str | None = None
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalogue.

    `source`: hub repository, None for a model that comes with fewstep and has its shapes in its own folder.
    `megabytes`: about what is downloaded, in half precision where that is published. `texts`: the text towers in
    order. `terms`: what the licence forbids, in one line. `base`: the entry that this one is a LoRA of.
    """

    name: str
    family: Family
    licence: str
    terms: str
    source: str | None = None
    base: str | None = None
    megabytes: int = 0
    unet: UNetConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    texts: tuple[TextConfig, ...] = ()
    defaults: Defaults | None = None


def entry(name: str) -> Entry:
    """The entry called `name`, in any usual spelling; InputError says what there is when there is none."""
    if (key := _key(name)) in _SPELLINGS:
        return CATALOGUE[_SPELLINGS[key]]
    raise InputError(unknown("model", name, CATALOGUE) if key not in NAMELESS else f"{quoted(name)}: {NAMELESS[key]}")


def _key(name: str) -> str:
    """What all spellings of a name share: its letters and digits, small, with `stable-diffusion-v` as `sd`."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("stablediffusion", "sd").replace("sdv", "sd")


def _stages(*rows: tuple[int, int, int], resnets: int = 2) -> tuple[Stage, ...]:
    return tuple(Stage(channels=c, depth=d, heads=h, resnets=resnets) for c, d, h in rows)


# the levels of the UNets: channels, transformer depth, heads
SD1_LEVELS = ((320, 1, 8), (640, 1, 8), (1280, 1, 8), (1280, 0, 8))
SD2_LEVELS = ((320, 1, 5), (640, 1, 10), (1280, 1, 20), (1280, 0, 20))
SDXL_LEVELS = ((320, 0, 5), (640, 2, 10), (1280, 10, 20))
REFINER_LEVELS = ((384, 0, 6), (768, 4, 12), (1536, 4, 24), (1536, 0, 24))

SD1_UNET = UNetConfig(stages=_stages(*SD1_LEVELS), context=768)
SMALL_UNET = UNetConfig(stages=_stages(*SD1_LEVELS, resnets=1), context=768)
SD2_UNET = UNetConfig(stages=_stages(*SD2_LEVELS), context=1024, linear_projection=True)
SDXL_UNET = UNetConfig(stages=_stages(*SDXL_LEVELS), context=2048, mid_depth=10, linear_projection=True, addition=2816)
REFINER_UNET = replace(SDXL_UNET, stages=_stages(*REFINER_LEVELS), context=1280, mid_depth=4, addition=2560)
SD_AUTOENCODER = AutoencoderConfig()
SDXL_AUTOENCODER = AutoencoderConfig(scaling_factor=0.13025, force_upcast=True)
CLIP_L = TextConfig()
OPENCLIP_H = TextConfig(width=1024, layers=23, heads=16, inner=4096, activation="gelu")
OPENCLIP_G = TextConfig(width=1280, layers=32, heads=20, inner=5120, activation="gelu", projection=1280)


_BLOCKS = Entry(
    name="blocks-base",
    family="blocks",
    licence="Apache-2.0",
    terms="none; it draws coloured shapes and nothing else",
    megabytes=16,
)
_SD1 = Entry(
    name="sd-v1-4",
    family="sd1",
    source="CompVis/stable-diffusion-v1-4",
    licence="creativeml-openrail-m",
    terms="no harmful use: the list in the licence's attachment A applies to whoever uses or shares the model",
    megabytes=2132,
    unet=SD1_UNET,
    autoencoder=SD_AUTOENCODER,
    texts=(CLIP_L,),
    defaults=Defaults(sampler="plms", guidance_scale=7.5, width=512, height=512),
)
_SD2 = replace(
    _SD1,
    name="sd-v2-1",
    family="sd2",
    source="stabilityai/stable-diffusion-2-1",
    licence="creativeml-openrail++-m",
    megabytes=2580,
    unet=SD2_UNET,
    texts=(OPENCLIP_H,),
    defaults=Defaults(sampler="ddim", guidance_scale=7.5, width=768, height=768),
)
_SDXL = replace(
    _SD1,
    name="sdxl-base",
    family="sdxl",
    source="stabilityai/stable-diffusion-xl-base-1.0",
    licence="creativeml-openrail++-m",
    megabytes=6938,
    unet=SDXL_UNET,
    autoencoder=SDXL_AUTOENCODER,
    texts=(CLIP_L, OPENCLIP_G),
    defaults=Defaults(sampler="euler", guidance_scale=5.0, width=1024, height=1024),
)


def _turbo(name: str, teacher: Entry, sampler: str) -> Entry:
    """One step, no guidance, 512 pixels."""
    return replace(
        teacher,
        name=name,
        source=f"stabilityai/{name}",
        licence="stabilityai-nc-research-community",
        terms="research and non-commercial use only; commercial use needs an agreement with Stability AI",
        defaults=Defaults(steps=1, guidance_scale=0.0, sampler=sampler, schedule="trailing", width=512, height=512),
    )


_ENTRIES = (
    _BLOCKS,
    replace(_BLOCKS, name="blocks-small", megabytes=12),
    replace(
        _BLOCKS,
        name="blocks-turbo",
        base="blocks-base",
        megabytes=21,
        defaults=Defaults(
            steps=4, guidance_scale=0.0, sampler="euler_ancestral", schedule="trailing", width=128, height=128
        ),
    ),
    _SD1,
    replace(_SD1, name="small-sd", source="OFA-Sys/small-stable-diffusion-v0", megabytes=3144, unet=SMALL_UNET),
    _SD2,
    _turbo("sd-turbo", _SD2, "euler"),
    _SDXL,
    _turbo("sdxl-turbo", _SDXL, "euler_ancestral"),
    replace(
        _SDXL,
        name="sdxl-refiner",
        family="sdxl-refiner",
        source="stabilityai/stable-diffusion-xl-refiner-1.0",
        megabytes=6076,
        unet=REFINER_UNET,
        texts=(OPENCLIP_G,),
    ),
    replace(_BLOCKS, name="blocks-tiny", family="tiny", megabytes=1),
    Entry(name="taesd", family="tiny", source="madebyollin/taesd", licence="mit", terms="none", megabytes=10),
    Entry(name="taesdxl", family="tiny", source="madebyollin/taesdxl", licence="mit", terms="none", megabytes=10),
)
CATALOGUE: Mapping[str, Entry] = {known.name: known for known in _ENTRIES}
"""Every entry by its name; the first is the one that comes with fewstep."""
TINY_NAMES = tuple(known.name for known in _ENTRIES if known.family == "tiny")
TINY = {"blocks": "blocks-tiny", "sd1": "taesd", "sd2": "taesd", "sdxl": "taesdxl", "sdxl-refiner": "taesdxl"}
"""The tiny autoencoder that reads and writes the latents of a family."""

_SPELLINGS = {_key(name): name for name in CATALOGUE} | {
    **dict.fromkeys(("sdxl", "sdxl10", "sdxlbase10"), "sdxl-base"),
    "sdxlrefiner10": "sdxl-refiner",
}
NAMELESS = {
    "turbo": "three models are called so; say blocks-turbo, sd-turbo or sdxl-turbo",
    "blocks": "three models are called so; say blocks-turbo, blocks-base or blocks-small",
    **dict.fromkeys(
        ("sd", "sd1", "sd11", "sd12", "sd13", "sd15", "sd2", "sd20"),
        "of Stable Diffusion 1 and 2 the versions 1.4 and 2.1 alone have names here, sd-v1-4 and sd-v2-1; "
        "the others have the same shapes, so give a folder, a file or a hub id (owner/name) of one",
    ),
}
"""What people type that names no entry, or several, by `_key`, and what there is to say about it."""
