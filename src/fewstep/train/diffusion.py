"""Latent diffusion training: a UNet learns to denoise the latents of captioned pictures (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.adapters.inject import ATTENTION, eject, inject, trained_lora
from fewstep.adapters.lora import networks as networks_of
from fewstep.adapters.save import save_lora
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Conditioning
from fewstep.images import contact_sheet
from fewstep.models.unet import UNet
from fewstep.pipeline.pipeline import Pipeline
from fewstep.text.prompt import tokenize
from fewstep.train.losses import min_snr_weight, stratified_timesteps
from fewstep.train.plan import Part, Plan
from fewstep.train.process import Process, predicted
from fewstep.train.run import Work
from fewstep.train.sources import Ahead, Examples, Source, Walked
from fewstep.train.trainer import Loss, Trainer, Turn
from fewstep.weights.load import load_parts
from fewstep.weights.parts import Parts
from fewstep.weights.save import save_parts

AESTHETIC = 6.0
"""The score that SDXL's refiner is told of every picture."""
Weighting = Literal["uniform", "min_snr"]


@dataclass(frozen=True, kw_only=True)
class DiffusionTask:
    """Train, or go on training, the UNet of `model`: a catalogue name, a folder, a file.

    `fresh`: begin from random weights of its shape. `text_drop`: share of captions left out, for classifier-free
    guidance. `weighting`: of squared errors over noise levels, "min_snr" with `gamma` and `floor` (see
    `min_snr_weight`). `offset_noise`: standard deviation of noise added to whole channels. `train_text`: train the
    text towers too. `lora_rank`: above 0, train a LoRA of that rank, beside the layers whose names end with
    `lora_targets`, instead of the weights.
    """

    model: str | Path
    data: Source
    fresh: bool = False
    text_drop: float = 0.1
    weighting: Weighting = "uniform"
    gamma: float = 5.0
    floor: float = 0.0
    offset_noise: float = 0.0
    train_text: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ATTENTION
    device: str = "cpu"
    sample_prompts: tuple[str, ...] = ()

    def prepare(self, plan: Plan) -> Work:
        """See `Task`."""
        torch.manual_seed(plan.seed)  # the same fresh weights on all ranks
        parts = load_parts(self.model, dtype=torch.float32, device=torch.device(self.device))
        if self.fresh:
            parts = replace(parts, unet=UNet(parts.unet.config).to(self.device))
        source, trained = Ahead(self.data), trained_network(parts, self)
        noisy = NoisyLatents(parts, source, text_drop=self.text_drop, offset_noise=self.offset_noise)
        return Work(
            turns={"model": Turn(network=trained, loss=denoising_loss(parts, noisy, self))},
            finish=lambda trainer: save_result(parts, trainer, trained),
            sample=(lambda trainer: sample_sheet(parts, self.sample_prompts)) if self.sample_prompts else None,
            waited=lambda: source.waited,
        )


def trained_network(parts: Parts, task: DiffusionTask) -> nn.Module:
    """What is trained: the UNet, with the text towers beside it, or their LoRAs."""
    networks = networks_of(parts) if task.train_text else {"unet": parts.unet}
    if task.lora_rank:
        return inject(networks, rank=task.lora_rank, targets=task.lora_targets)
    for network in networks.values():
        network.train().requires_grad_(True)
    return parts.unet if len(networks) == 1 else nn.ModuleDict(networks)


class Noisy(NamedTuple):
    """Latents x (B, 4, h, w) at steps t (B,), what the UNet is told of them and what it should put out."""

    x: Tensor
    t: Tensor
    told: Conditioning
    target: Tensor


class Clean(NamedTuple):
    """Latents x0 (B, 4, h, w) without noise, what the UNet is told of them, and what their source knew besides."""

    x0: Tensor
    told: Conditioning
    captions: Sequence[str] = ()
    walked: Walked | None = None


class NoisyLatents:
    """Makes the UNet's inputs and targets of a part: encodes, leaves captions out, adds noise."""

    def __init__(self, parts: Parts, source: Source, *, text_drop: float, offset_noise: float = 0.0) -> None:
        self.parts, self.source = parts, source
        self.text_drop, self.offset_noise = text_drop, offset_noise
        self.engine = EagerEngine(parts)
        self.process = Process(prediction=parts.scheduler.prediction, schedule=parts.scheduler.noise_schedule)

    def __call__(self, part: Part, *, train_text: bool = False) -> Noisy:
        clean = self.clean(part, train_text=train_text)
        x0, told = clean.x0, clean.told
        t = part.rows("t", lambda count, generator: stratified_timesteps(count, self.process.steps, generator))
        t, eps = t.to(x0.device), self._noise(x0, part)
        return Noisy(self.process.noised(x0, eps, t), t, told, self.process.target(x0, eps, t))

    def clean(self, part: Part, *, train_text: bool = False) -> Clean:
        """The part's latents without noise, and what is told of them."""
        examples = self.source.examples(part)
        gone = (part.rand("drop") < self.text_drop).tolist()
        said = ["" if drop else caption for drop, caption in zip(gone, examples.captions, strict=True)]
        told = told_of(self.parts, self.engine, replace(examples, captions=said), grad=train_text)
        return Clean(latents_of(self.engine, examples, part), told, said, examples.walked)

    def _noise(self, x0: Tensor, part: Part) -> Tensor:
        eps = part.randn("noise", *x0.shape[1:])
        if self.offset_noise:
            eps = eps + self.offset_noise * part.randn("offset", x0.shape[1], 1, 1)
        return eps.to(x0.device)


def denoising_loss(parts: Parts, noisy: NoisyLatents, task: DiffusionTask) -> Loss:
    """The weighted squared error of the UNet's output, mean over the part."""

    def loss(part: Part) -> Mapping[str, Tensor]:
        x, t, told, target = noisy(part, train_text=task.train_text)
        error = (predicted(parts.unet, x, t, told).float() - target).square()
        weight = torch.ones(())
        if task.weighting == "min_snr":
            alpha_bar = noisy.process.alpha_bar(t)
            weight = min_snr_weight(noisy.process.prediction, alpha_bar, task.gamma, floor=task.floor)
        return {"loss": (weight.to(error.device) * error).mean(), "error": error.mean()}

    return loss


@torch.no_grad()
def latents_of(engine: EagerEngine, examples: Examples, part: Part) -> Tensor:
    """Scaled latents (B, 4, h, w), sampled from the autoencoder's normal distributions."""
    if examples.latents is not None:
        return examples.latents.to(engine.device)
    assert examples.pictures is not None, "a source gives pictures or latents"
    mean, deviation = engine.encode(examples.pictures)
    return mean + deviation * part.randn("latents", *mean.shape[1:]).to(mean.device)


def told_of(parts: Parts, engine: EagerEngine, examples: Examples, *, grad: bool = False) -> Conditioning:
    """What the UNet is told of examples; an empty caption of SDXL is all zeros where it was trained so."""
    ids = [tokenize(examples.captions, tokenizer, chunk=False).ids for tokenizer in parts.tokenizers]
    with torch.set_grad_enabled(grad):
        context, pooled = engine.encode_text(ids)
    if parts.force_zeros_for_empty_prompt:
        said = torch.tensor([bool(caption) for caption in examples.captions], device=context.device)
        context = context * said[:, None, None]
        pooled = None if pooled is None else pooled * said[:, None]
    sizes = size_numbers(parts, examples)
    return Conditioning(context=context, pooled=pooled, sizes=None if sizes is None else sizes.to(context.device))


def size_numbers(parts: Parts, examples: Examples) -> Tensor | None:
    """The numbers (B, 6) that SDXL is told, or (B, 5) its refiner; a whole picture of the native size by default."""
    count, size = parts.unet.config.size_numbers, (parts.defaults.height, parts.defaults.width)
    if not count:
        return None
    whole = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(examples.captions), 1)
    numbers = whole if examples.sizes is None else examples.sizes
    return numbers if count == 6 else torch.cat([numbers[:, :4], torch.full((len(numbers), 1), AESTHETIC)], dim=1)


def sample_sheet(parts: Parts, prompts: Sequence[str]) -> Image.Image:
    """A picture of each prompt, always from the same seeds."""
    modes = [(network, network.training) for network in (parts.unet, *parts.text_encoders)]
    try:
        for network, _ in modes:
            network.eval()
        return contact_sheet(Pipeline(parts).text_to_image(list(prompts), seed=0).images, 4)
    finally:
        for network, training in modes:
            network.train(training)


def save_result(parts: Parts, trainer: Trainer, trained: nn.Module, name: str = "model") -> None:
    """The averaged weights as a model folder `model`, or the averaged LoRA as `lora.safetensors`, beside the log.

    `trained`, which lies in `parts`, is what the pupil `name` trained.
    """
    folder = trainer.plan.folder
    averaged = trainer.averaged(name)  # of all ranks together; the first has the whole
    if trainer.rank:
        return
    trained.load_state_dict(averaged)
    if isinstance(trained, nn.ModuleList):
        save_lora(trained_lora(trained, folder.name), folder / "lora.safetensors")
        eject(networks_of(parts))
    else:
        save_parts(replace(parts, name=folder.name), folder / "model")
