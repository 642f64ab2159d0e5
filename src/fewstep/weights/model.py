"""What a model is, apart from its weights, and a whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple, Protocol

from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import SCHEDULES
from fewstep.errors import CheckpointError, quoted
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.models.networks import Networks
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults, Entry, Family
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.scheduler import SchedulerConfig

_RANGES = {"steps": (1, 1000), "guidance_scale": (0, 100), "width": (64, 8192), "height": (64, 8192)}
_NAMES = {"sampler": tuple(SAMPLERS), "schedule": SCHEDULES}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that a run needs to know about a model; it holds no tensor.

    `name`: the catalogue's, the folder's or the file's. `texts`: the text encoders in order. `revision`: that of the
    hub, where one was asked for. `force_zeros_for_empty_prompt`: as SDXL's base was trained.
    """

    name: str
    family: Family
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    texts: tuple[TextConfig, ...]
    scheduler: SchedulerConfig
    defaults: Defaults
    licence: str
    revision: str | None = None
    force_zeros_for_empty_prompt: bool = False


class Loaded(Protocol):
    """What has a model in memory: a `LoadedModel`, or a pipeline that runs torch networks."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""

    @property
    def tokenizers(self) -> tuple[Tokenizer, ...]:
        """One for each text encoder."""

    @property
    def networks(self) -> Networks:
        """Its networks."""


class LoadedModel(NamedTuple):
    """A model in memory: what it is, a tokenizer for each text encoder, and its networks."""

    spec: ModelSpec
    tokenizers: tuple[Tokenizer, ...]
    networks: Networks

    @classmethod
    def of(cls, networks: Networks, tokenizers: tuple[Tokenizer, ...], **spec: Any) -> LoadedModel:
        """The model of these networks, whose configs go into the spec beside its other entries."""
        unet, autoencoder = networks.unet.config, networks.autoencoder.config
        texts = tuple(encoder.config for encoder in networks.text_encoders)
        return cls(ModelSpec(unet=unet, autoencoder=autoencoder, texts=texts, **spec), tokenizers, networks)

    def with_spec(self, **changes: Any) -> LoadedModel:
        """The same networks under a spec with other entries."""
        return self._replace(spec=replace(self.spec, **changes))

    def with_tiny(self, tiny: TinyAutoencoder) -> LoadedModel:
        """The same model with a decoder in the autoencoder's place."""
        return self._replace(networks=replace(self.networks, tiny=tiny))

    def with_unet(self, unet: UNet) -> LoadedModel:
        """The same model with another UNet, whose config goes into the spec."""
        return self.with_spec(unet=unet.config)._replace(networks=replace(self.networks, unet=unet))


def family_of(unet: UNetConfig) -> Family:
    """The family by the UNet's conditioning and its kind of projections; SD 1 and 2 differ in nothing else."""
    if unet.addition:
        return "sdxl" if unet.size_numbers == 6 else "sdxl-refiner"
    return "sd2" if unet.linear_projection else "sd1"


def usual_defaults(
    family: Family, scheduler: SchedulerConfig, size: tuple[int, int], noted: Mapping[str, Any] | None = None
) -> Defaults:
    """What diffusers' pipelines do for `family` when they are not told; `size` is width, height in pixels.

    Of the published models the turbo ones alone walk Euler steps over trailing levels: they draw in one, unguided.
    Before that go the defaults `noted` in the model's folder; CheckpointError for a note of another name or kind.
    """
    turbo = scheduler.spacing == "trailing" and scheduler.sampler in ("euler", "euler_ancestral")
    usual = Defaults(
        steps=1 if turbo else 50,
        guidance_scale=0.0 if turbo else 5.0 if family in ("sdxl", "sdxl-refiner") else 7.5,
        sampler=scheduler.sampler,
        width=size[0],
        height=size[1],
    )
    noted = {name: value for name, value in (noted or {}).items() if value is not None}
    for name, value in noted.items():
        low, high = _RANGES.get(name, (inf, -inf))
        number = type(value) is int or (type(value) is float and name == "guidance_scale")
        if not (low <= value <= high if number else value in _NAMES.get(name, ())):
            raise CheckpointError(f"model_index.json: the default {quoted(name)} = {quoted(value)} cannot be used")
    return replace(usual, **noted)


def published(spec: ModelSpec, known: Entry) -> ModelSpec:
    """`spec` under the name, licence, steps, guidance and size of its entry; the sampler is the checkpoint's own."""
    defaults = known.defaults or spec.defaults
    defaults = replace(defaults, sampler=spec.defaults.sampler, schedule=spec.defaults.schedule)
    return replace(spec, name=known.name, family=known.family, licence=known.licence, defaults=defaults)
