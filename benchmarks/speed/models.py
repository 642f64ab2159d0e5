"""Models of the real shapes with random weights: made on a device, or saved as folders that peers read."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.speed.tasks import NoiseLevels, Task
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import sigmas_for
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Entry, entry
from fewstep.text.tokenizer import word_tokenizer
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model, save_tiny
from fewstep.weights.scheduler import SchedulerConfig

Network = TypeVar("Network", bound=nn.Module)


def random_model(task: Task) -> Path:
    """The folder of a task's random model, written where it is not there yet; 3 GB for Small-SD, 14 GB for SDXL."""
    if not (task.folder / "model_index.json").is_file():
        _alone(_save_model, task)
    if task.decoder is not None and not (task.decoder / "config.json").is_file():
        _alone(_save_tiny, task)
    return task.folder


def random_loaded_of(task: Task) -> LoadedModel:
    """The model of a task, made on its device: no file is read or written."""
    model = random_loaded(task.model, task.device, getattr(torch, task.dtype))
    return model if task.decoder is None else model.with_tiny(random_tiny(task.device, getattr(torch, task.dtype)))


@lru_cache(maxsize=1)
def random_loaded(name: str, device: str, dtype: torch.dtype) -> LoadedModel:
    """A model of the catalogue's shape in `dtype`, the same in each process of a device; the last one is kept."""
    known = entry(name)
    assert known.unet is not None
    assert known.autoencoder is not None
    assert known.defaults is not None
    words = word_tokenizer(["a"], 77)
    unet, autoencoder = known.unet, known.autoencoder
    return LoadedModel.of(
        Networks(
            unet=_random(lambda: UNet(unet), device, dtype),
            autoencoder=_random(lambda: AutoencoderKL(autoencoder), device, dtype),
            text_encoders=tuple(_random(partial(TextEncoder, config), device, dtype) for config in known.texts),
        ),
        (words,) * len(known.texts),
        name=name,
        family=known.family,
        scheduler=_scheduler(known),
        defaults=known.defaults,
        licence=known.licence,
    )


def random_tiny(device: str, dtype: torch.dtype) -> TinyAutoencoder:
    """A tiny autoencoder, filled at random."""
    return _random(TinyAutoencoder, device, dtype)


def noise_levels_of(name: str, steps: int, sampler: str) -> NoiseLevels:
    """The noise levels of a run of a model, as fewstep's own pipeline has them."""
    known, spec = entry(name), SAMPLERS[sampler]
    config = _scheduler(known)
    assert known.defaults is not None
    schedule = config.schedule_for(sampler)
    sigmas = sigmas_for(
        schedule,
        steps,
        config.noise_schedule,
        steps_offset=config.steps_offset,
        convention=spec.convention,
        family="sd",
    )
    times = tuple(config.noise_schedule.sigma_to_t(sigma) for sigma in sigmas[:-1])
    return NoiseLevels(sigmas=sigmas, times=times, scale=spec.initial_scale(schedule, sigmas[0]))


def _alone(function: Callable[..., None], *given: Any) -> None:
    """Call `function` in a process of its own, so that its memory is freed."""
    process = mp.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: no random model could be made (exit code {process.exitcode}); is there room for it?")


def _save_model(task: Task) -> None:
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(random_loaded(task.model, task.device, getattr(torch, task.dtype)), task.folder)


def _save_tiny(task: Task) -> None:
    assert task.decoder is not None
    save_tiny(random_tiny(task.device, getattr(torch, task.dtype)), task.decoder)


def _scheduler(known: Entry) -> SchedulerConfig:
    assert known.defaults is not None
    return SchedulerConfig(sampler=known.defaults.sampler, spacing=known.defaults.schedule or "leading")


@torch.no_grad()
def _random(make: Callable[[], Network], device: str, dtype: torch.dtype) -> Network:
    """A network filled on `device` as PyTorch fills its layers, which keeps float16 finite.

    Its norms do something: PyTorch's own begin at 1 and 0.
    """
    with torch.device("meta"):
        network = make().to(dtype)
    network.to_empty(device=device)
    torch.manual_seed(0)
    for module in network.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()  # type: ignore[operator]
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.add_(torch.randn_like(module.weight), alpha=0.1)
            module.bias.add_(torch.randn_like(module.bias), alpha=0.1)
    return network.eval().requires_grad_(False)
