"""Latent diffusion training: a UNet learns to denoise the latents of captioned pictures (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.adapters.inject import ATTENTION, eject, inject, trained_lora
from fewstep.adapters.lora import networks as networks_of
from fewstep.adapters.save import save_lora
from fewstep.engines.device import choose_device
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Conditioning
from fewstep.images import contact_sheet
from fewstep.models.unet import UNet
from fewstep.pipeline.pipeline import Pipeline
from fewstep.text.prompt import tokenize
from fewstep.train.datasets import CaptionedBatch, Prefetcher, Source, TrajectoryBatch
from fewstep.train.forward_process import ForwardProcess, predicted
from fewstep.train.losses import min_snr_weight, stratified_timesteps
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.renamed import refuses_renamed
from fewstep.train.stages import StageSetup
from fewstep.train.trainer import Loss, Objective, Trainer
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model

AESTHETIC = 6.0
"""The aesthetic score in the size conditioning of SDXL's refiner."""
LARGE = 100_000_000
"""Parameters of a UNet whose kernels take longer than their launch, so that CUDA graphs save nothing."""
Weighting = Literal["uniform", "min_snr"]


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class DiffusionTask:
    """Train, or go on training, the UNet of `model`: a catalogue name, a folder, a file.

    `fresh`: begin from random weights of its shape. `caption_dropout`: share of captions left out, for classifier-free
    guidance. `weighting`: of squared errors over noise levels, "min_snr" with `snr_gamma` and `snr_floor` (see
    `min_snr_weight`). `offset_noise`: standard deviation of noise added to whole channels. `train_text`: train the
    text towers too. `lora_rank`: above 0, train a LoRA of that rank, beside the layers whose names end with
    `lora_targets`, instead of the weights. `device`: the best one here unless it is named.
    """

    model: str | Path
    data: Source
    fresh: bool = False
    caption_dropout: float = 0.1
    weighting: Weighting = "uniform"
    snr_gamma: float = 5.0
    snr_floor: float = 0.0
    offset_noise: float = 0.0
    train_text: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ATTENTION
    device: str | None = None
    sample_prompts: tuple[str, ...] = ()

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        torch.manual_seed(plan.seed)  # the same fresh weights on all ranks
        device = choose_device(self.device)
        model = load_model(self.model, dtype=torch.float32, device=device)
        if self.fresh:
            model = model.with_unet(UNet(model.spec.unet).to(device))
        source, trained = Prefetcher(self.data), trained_network(model, self)
        noisy = NoisyLatents(model, source, caption_dropout=self.caption_dropout, offset_noise=self.offset_noise)
        return StageSetup(
            objectives={"model": Objective(network=trained, loss=denoising_loss(model, noisy, self), kind=noisy.kind)},
            finish=lambda trainer: save_result(model, trainer, trained),
            sample=(lambda trainer: sample_sheet(model, self.sample_prompts)) if self.sample_prompts else None,
            waited_seconds=lambda: source.waited_seconds,
        )


def trained_network(model: LoadedModel, task: DiffusionTask) -> nn.Module:
    """What is trained: the UNet, with the text towers beside it, or their LoRAs."""
    networks = networks_of(model) if task.train_text else {"unet": model.networks.unet}
    if task.lora_rank:
        return inject(networks, rank=task.lora_rank, targets=task.lora_targets)
    for network in networks.values():
        network.train().requires_grad_(True)
    return model.networks.unet if len(networks) == 1 else nn.ModuleDict(networks)


class NoisyBatch(NamedTuple):
    """Noised latents x (B, 4, h, w) at steps t (B,), their conditioning and the target of the UNet's output."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor


class LatentBatch(NamedTuple):
    """Clean latents x0 (B, 4, h, w), their conditioning, and the teacher's trajectories where the source has them."""

    x0: Tensor
    conditioning: Conditioning
    trajectories: TrajectoryBatch | None = None


class NoisyLatents:
    """The UNet's inputs and targets of a micro-batch: encodes pictures and captions, drops captions, adds noise."""

    def __init__(
        self, model: LoadedModel, source: Source, *, caption_dropout: float, offset_noise: float = 0.0
    ) -> None:
        self.model, self.source = model, source
        self.caption_dropout, self.offset_noise = caption_dropout, offset_noise
        self.engine = EagerEngine(model.spec, model.networks)
        self.process = ForwardProcess(
            prediction=model.spec.scheduler.prediction, schedule=model.spec.scheduler.noise_schedule
        )

    def __call__(self, micro_batch: MicroBatch, *, train_text: bool = False) -> NoisyBatch:
        micro_batch = micro_batch.on(self.engine.device)
        clean = self.clean(micro_batch, train_text=train_text)
        x0, conditioning = clean.x0, clean.conditioning
        t = micro_batch.rows("t", lambda count, generator: stratified_timesteps(count, self.process.steps, generator))
        eps = self._noise(x0, micro_batch)
        return NoisyBatch(self.process.noised(x0, eps, t), t, conditioning, self.process.target(x0, eps, t))

    def clean(self, micro_batch: MicroBatch, *, train_text: bool = False) -> LatentBatch:
        """The micro-batch's clean latents and their conditioning."""
        micro_batch = micro_batch.on(self.engine.device)
        read = micro_batch.inputs(self._read)
        trajectories = TrajectoryBatch(points=read["points"], end=read["end"]) if "end" in read else None
        tokens = TokenizedConditioning.of(read)
        conditioning = encoded_conditioning(self.model, self.engine, tokens, grad=train_text)
        return LatentBatch(self._latents(read, micro_batch), conditioning, trajectories)

    @property
    def kind(self) -> Callable[[MicroBatch], Hashable] | None:
        """See `Objective.kind`: one for all; None, so that nothing is captured, above 100 M parameters."""
        large = sum(parameter.numel() for parameter in self.model.networks.unet.parameters()) > LARGE
        return None if large else lambda micro_batch: None

    def _read(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """The source's tensors, and tokens of its captions, a share of them dropped."""
        batch = self.source.batch(micro_batch)
        dropped = (micro_batch.rand("drop") < self.caption_dropout).tolist()
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)]
        tokens = tokenized_conditioning(self.model, replace(batch, captions=captions)).tensors()
        optional = {"latents": batch.latents, "pictures": batch.pictures}
        trajectories = {} if batch.trajectories is None else batch.trajectories._asdict()
        return tokens | trajectories | {name: value for name, value in optional.items() if value is not None}

    @torch.no_grad()
    def _latents(self, read: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        """Scaled latents (B, 4, h, w), sampled from the autoencoder's normal distributions."""
        if "latents" in read:
            return read["latents"]
        mean, deviation = self.engine.encode(read["pictures"])
        return mean + deviation * micro_batch.randn("latents", *mean.shape[1:])

    def _noise(self, x0: Tensor, micro_batch: MicroBatch) -> Tensor:
        eps = micro_batch.randn("noise", *x0.shape[1:])
        if self.offset_noise:
            eps = eps + self.offset_noise * micro_batch.randn("offset", x0.shape[1], 1, 1)
        return eps


def denoising_loss(model: LoadedModel, noisy: NoisyLatents, task: DiffusionTask) -> Loss:
    """The weighted squared error of the UNet's output, mean over the micro-batch."""

    def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        x, t, conditioning, target = noisy(micro_batch, train_text=task.train_text)
        error = (predicted(model.networks.unet, x, t, conditioning).float() - target).square()
        weight = error.new_ones(())
        if task.weighting == "min_snr":
            alpha_bar = noisy.process.alpha_bar(t)
            weight = min_snr_weight(noisy.process.prediction, alpha_bar, task.snr_gamma, floor=task.snr_floor)
        return {"loss": (weight * error).mean(), "error": error.mean()}

    return loss


class TokenizedConditioning(NamedTuple):
    """A UNet's conditioning before the text towers: token ids and sizes, on the CPU or the towers' device.

    `ids`: of each tower (B, 1, window). `has_caption` (B,) bool: where the caption is not empty, for models
    that take zeros for an empty one. `sizes`: SDXL's.
    """

    ids: tuple[Tensor, ...]
    has_caption: Tensor | None = None
    sizes: Tensor | None = None

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> TokenizedConditioning:
        """From the result of `tensors`."""
        ids = tuple(value for name, value in named.items() if name.startswith("ids"))
        return cls(ids, named.get("has_caption"), named.get("sizes"))

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        others = {"has_caption": self.has_caption, "sizes": self.sizes}
        known = {name: value for name, value in others.items() if value is not None}
        return {f"ids_{i}": ids for i, ids in enumerate(self.ids)} | known


def tokenized_conditioning(model: LoadedModel, batch: CaptionedBatch) -> TokenizedConditioning:
    """The token ids of a batch's captions and its size conditioning, on the CPU."""
    ids = tuple(tokenize(batch.captions, tokenizer, chunk=False).ids for tokenizer in model.tokenizers)
    zeros = model.spec.force_zeros_for_empty_prompt
    has_caption = torch.tensor([bool(caption) for caption in batch.captions]) if zeros else None
    return TokenizedConditioning(ids, has_caption, size_numbers(model, batch))


def encoded_conditioning(
    model: LoadedModel, engine: EagerEngine, tokens: TokenizedConditioning, *, grad: bool = False
) -> Conditioning:
    """The conditioning after the text towers; an empty caption of SDXL is all zeros where it was trained so."""
    with torch.set_grad_enabled(grad):
        context, pooled = engine.encode_text(tokens.ids)
    if tokens.has_caption is not None:
        has_caption = tokens.has_caption.to(context.device)
        context = context * has_caption[:, None, None]
        pooled = None if pooled is None else pooled * has_caption[:, None]
    sizes = None if tokens.sizes is None else tokens.sizes.to(context.device)
    return Conditioning(context=context, pooled=pooled, sizes=sizes)


def conditioning_of(
    model: LoadedModel, engine: EagerEngine, batch: CaptionedBatch, *, grad: bool = False
) -> Conditioning:
    """The conditioning of a batch's captions and sizes."""
    return encoded_conditioning(model, engine, tokenized_conditioning(model, batch), grad=grad)


def size_numbers(model: LoadedModel, batch: CaptionedBatch) -> Tensor | None:
    """The size conditioning (B, 6) of SDXL, or (B, 5) of its refiner; by default of a whole picture in native size."""
    count, size = model.spec.unet.size_numbers, (model.spec.defaults.height, model.spec.defaults.width)
    if not count:
        return None
    whole = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(batch.captions), 1)
    numbers = whole if batch.sizes is None else batch.sizes
    return numbers if count == 6 else torch.cat([numbers[:, :4], torch.full((len(numbers), 1), AESTHETIC)], dim=1)


def sample_sheet(model: LoadedModel, prompts: Sequence[str]) -> Image.Image:
    """A picture of each prompt, always from the same seeds."""
    modes = [(network, network.training) for network in (model.networks.unet, *model.networks.text_encoders)]
    try:
        for network, _ in modes:
            network.eval()
        on_card = model.networks.unet.conv_in.weight.is_cuda  # where other engines prepare for weights that stay
        pipe = Pipeline.of(model, plain=on_card)
        return contact_sheet(pipe.text_to_image(list(prompts), seed=0).images, 4)
    finally:
        for network, training in modes:
            network.train(training)


def save_result(model: LoadedModel, trainer: Trainer, trained: nn.Module, name: str = "model") -> None:
    """The averaged weights as a model folder `model`, or the averaged LoRA as `lora.safetensors`, beside the log.

    `trained`, which lies in `model`, is the network of the objective `name`.
    """
    folder = trainer.plan.folder
    averaged = trainer.averaged(name)  # of all ranks together; the first has the whole
    if trainer.rank:
        return
    trained.load_state_dict(averaged)
    if isinstance(trained, nn.ModuleList):
        save_lora(trained_lora(trained, folder.name), folder / "lora.safetensors")
        eject(networks_of(model))
    else:
        save_model(model.with_spec(name=folder.name), folder / "model")
