"""Models of the real shapes with random weights: made once, kept as diffusers folders that every peer reads."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.speed.tasks import Walk
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import sigmas_for
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Entry, entry
from fewstep.text.tokenizer import word_tokenizer
from fewstep.weights.parts import Parts
from fewstep.weights.save import save_parts, save_tiny
from fewstep.weights.scheduler import SchedulerConfig

Network = TypeVar("Network", bound=nn.Module)


def random_model(name: str, cache: Path) -> Path:
    """The folder of a model of the catalogue's shape, filled at random; 3 GB for Small-SD, 14 GB for SDXL."""
    folder = cache / f"random-{name}"
    if not (folder / "model_index.json").is_file():
        _alone(_save_model, name, folder)
    return folder


def random_tiny(cache: Path) -> Path:
    """The folder of a tiny autoencoder, filled at random."""
    folder = cache / "random-taesd"
    if not (folder / "config.json").is_file():
        _alone(_save_tiny, folder)
    return folder


def walk_of(name: str, steps: int, sampler: str) -> Walk:
    """The levels that a run of a model visits, as fewstep's own pipeline has them."""
    known, spec = entry(name), SAMPLERS[sampler]
    config = _scheduler(known)
    assert known.defaults is not None
    schedule = config.schedule_for(sampler)
    sigmas = sigmas_for(
        schedule, steps, config.noise_schedule, steps_offset=config.steps_offset, reading=spec.reading, family="sd"
    )
    times = tuple(config.noise_schedule.sigma_to_t(sigma) for sigma in sigmas[:-1])
    return Walk(sigmas=sigmas, times=times, scale=spec.initial_scale(schedule, sigmas[0]))


def _alone(function: Callable[..., None], *given: Any) -> None:
    """In a process of its own, whose gigabytes go with it."""
    process = mp.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: no random model could be made (exit code {process.exitcode}); is there room for it?")


def _save_model(name: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_parts(_random_parts(name), folder)


def _save_tiny(folder: Path) -> None:
    torch.manual_seed(0)
    save_tiny(TinyAutoencoder().eval(), folder)


def _scheduler(known: Entry) -> SchedulerConfig:
    assert known.defaults is not None
    return SchedulerConfig(sampler=known.defaults.sampler, spacing=known.defaults.schedule or "leading")


def _random_parts(name: str) -> Parts:
    known = entry(name)
    assert known.unet is not None
    assert known.autoencoder is not None
    assert known.defaults is not None
    torch.manual_seed(0)
    words = word_tokenizer(["a"], 77)
    return Parts(
        name=name,
        family=known.family,
        unet=_perturbed(UNet(known.unet)),
        autoencoder=_perturbed(AutoencoderKL(known.autoencoder)),
        text_encoders=tuple(_perturbed(TextEncoder(config)) for config in known.texts),
        tokenizers=(words,) * len(known.texts),
        scheduler=_scheduler(known),
        defaults=known.defaults,
        licence=known.licence,
    )


@torch.no_grad()
def _perturbed(network: Network) -> Network:
    """Norms that do something: PyTorch's own start is 1 and 0."""
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight += 0.1 * torch.randn_like(module.weight)
            module.bias += 0.1 * torch.randn_like(module.bias)
    return network.eval().requires_grad_(False)
