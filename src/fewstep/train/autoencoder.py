"""Autoencoder training: reconstruction, perceptual, KL and adversarial losses (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.engines.device import choose_device
from fewstep.errors import CheckpointError, InputError
from fewstep.images import contact_sheet, to_pil
from fewstep.models.autoencoder import AutoencoderKL, Posterior
from fewstep.train.datasets import Prefetcher, Source
from fewstep.train.patchgan import PatchDiscriminator, adaptive_weight, hinge_loss
from fewstep.train.plan import MicroBatch, Plan, to_device
from fewstep.train.renamed import refuses_renamed
from fewstep.train.stages import StageSetup
from fewstep.train.trainer import Objective, Trainer
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model

SHOWN = 8
"""Pictures on a sample sheet."""
MEASURED = 8
"""Steps whose pictures give the latents' standard deviation."""


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class AutoencoderTask:
    """Train, or go on training, the autoencoder of `model` (a catalogue name, a folder, a file) on pictures.

    The loss is the L1 distance plus `perceptual_weight` times the perceptual one, both summed over a picture's
    numbers, plus `kl_weight` times its latents' summed divergence from N(0, 1), plus the adversarial loss. That one
    weighs `discriminator_weight` times `adaptive_weight`, and is there from step `discriminator_start` on; 0 leaves
    the discriminator, with `discriminator_width` channels, out. The defaults are the published ones.

    `fresh`: begin from random weights. `perceptual`: file of a `PerceptualDistance`; None leaves the term out.
    `decoder_only`: leave the latents as they are, so that a UNet made for them stays right. `rescale`: set the scaling
    factor to one over the latents' deviation when all is done.
    """

    model: str | Path
    data: Source
    fresh: bool = False
    perceptual: Path | None = None
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    discriminator_weight: float = 0.5
    discriminator_start: int = 50_001
    discriminator_width: int = 64
    decoder_only: bool = False
    rescale: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.fresh and self.decoder_only:
            raise InputError("fresh and decoder_only would train a decoder of random latents; leave one of them out")

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`. Raises `InputError` for a plan that this training cannot follow."""
        _check(plan)
        torch.manual_seed(plan.seed)  # all ranks begin with the same weights
        device = choose_device(self.device)
        model = load_model(self.model, dtype=torch.float32, device=device)
        if self.fresh:
            fresh = AutoencoderKL(model.spec.autoencoder).to(device)
            model = model._replace(networks=replace(model.networks, autoencoder=fresh))
        source = Prefetcher(self.data)
        return StageSetup(
            objectives=Reconstruction(model.networks.autoencoder, source, self).objectives(),
            finish=lambda trainer: save_autoencoder(model, trainer, self.data if self.rescale else None),
            sample=lambda trainer: reconstruction_sheet(model.networks.autoencoder, self.data, trainer),
            waited_seconds=lambda: source.waited_seconds,
        )


class Reconstruction:
    """The losses of the autoencoder and of the discriminator; both read the same decoded pictures."""

    def __init__(self, model: AutoencoderKL, source: Source, task: AutoencoderTask) -> None:
        self.model, self.source, self.task = model, source, task
        self.device = next(model.parameters()).device
        model.train().requires_grad_(True)
        if task.decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)
        self.perceptual = None if task.perceptual is None else PerceptualDistance(task.perceptual, self.device)
        self.discriminator = PatchDiscriminator(task.discriminator_width).to(self.device)
        self._decoded: dict[MicroBatch, tuple[Tensor, Tensor]] = {}

    def objectives(self) -> dict[str, Objective]:
        """The model's objective, then the discriminator's unless its weight is 0."""
        objectives = {"model": Objective(network=self.model, loss=self.model_loss)}
        if self.task.discriminator_weight:
            objectives["discriminator"] = Objective(
                network=self.discriminator, loss=self.discriminator_loss, weight_decay=0.0
            )
        return objectives

    def model_loss(self, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """The distance of the decoded pictures, the latents' divergence and the adversarial loss."""
        image = to_device(pictures_of(self.source, micro_batch), self.device)
        moments = self._moments(image)
        decoded = self.model.decode(sample_posterior(moments, micro_batch)).float()
        terms = self._distances(decoded, image)
        loss = error = terms.pop("error")
        if not self.task.decoder_only:
            terms["kl"] = divergence(moments)
            loss = loss + self.task.kl_weight * terms["kl"]
        if self._is_adversarial(micro_batch):
            self._decoded[micro_batch] = image, decoded.detach()
            generator_loss = -self.discriminator(decoded).float().mean()
            weight = adaptive_weight(error, generator_loss, self.model.decoder.conv_out.weight)
            loss = loss + self.task.discriminator_weight * weight * generator_loss
            terms |= {"generator_loss": generator_loss, "weight": weight}
        return {"loss": loss, **terms}

    def discriminator_loss(self, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """The hinge loss of real and decoded pictures; before it judges, a zero that leaves all weights alone."""
        if not self._is_adversarial(
            micro_batch
        ):  # gradients of zero, not none: an optimizer without a state cannot be saved as it is
            return {"loss": 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()}
        image, decoded = self._decoded.pop(micro_batch)
        real, generated = self.discriminator(image).float(), self.discriminator(decoded).float()
        return {"loss": hinge_loss(real, generated), "real": real.mean(), "drawn": generated.mean()}

    def _is_adversarial(self, micro_batch: MicroBatch) -> bool:
        return self.task.discriminator_weight > 0 and micro_batch.step >= self.task.discriminator_start

    def _moments(self, image: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.task.decoder_only):
            return self.model.encode(image).float()

    def _distances(self, decoded: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The distances by name, and their weighted sum "error", summed over a picture's numbers."""
        terms = {"l1": (decoded - image).abs().mean()}
        error = terms["l1"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, image)
            error = error + self.task.perceptual_weight * terms["perceptual"]
        return terms | {"error": error * image[0].numel()}


class PerceptualDistance:
    """The distance of pictures in the features of a network, which a TorchScript file of the user's holds.

    It takes pictures (B, 3, H, W) in [-1, 1] and gives a list of maps (B, C_k, h_k, w_k). They are compared as
    arXiv:1801.03924, eq. 1 does, at unit length over their channels, all of which count alike. Raises `InputError`
    where there is no file, and `CheckpointError` where it is not such a network.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise InputError(f"there is no perceptual network {path}; give the path of a TorchScript file, or none")
        try:
            network: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise CheckpointError(f"{path} is no TorchScript file ({str(error).splitlines()[0]})") from error
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.path, self.network = path, network.eval()

    def __call__(self, decoded: Tensor, image: Tensor) -> Tensor:
        """Squared distances, summed over the channels and maps, mean over places and pictures; a scalar."""
        with torch.no_grad():
            targets = self.maps(image)
        squares = [(a - b).square().sum(1).mean() for a, b in zip(self.maps(decoded), targets, strict=True)]
        return torch.stack(squares).sum()

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The features at unit length."""
        maps = self.network(pictures)
        if not isinstance(maps, list | tuple) or not all(isinstance(one, Tensor) and one.ndim == 4 for one in maps):
            raise CheckpointError(f"the perceptual network {self.path} must give a list of maps (B, C, h, w)")
        return [F.normalize(one.float(), dim=1, eps=1e-10) for one in maps]


def divergence(moments: Tensor) -> Tensor:
    """From N(0, 1), of latents with moments (B, 2C, h, w): summed over each picture's, mean over the pictures."""
    return Posterior.of(moments).kl().sum((1, 2, 3)).mean()


def sample_posterior(moments: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Latents (B, C, h, w) drawn from moments (B, 2C, h, w): means, then log-variances."""
    posterior = Posterior.of(moments)
    return posterior.sample(micro_batch.on(moments.device).randn("latents", *posterior.mean.shape[1:]))


def pictures_of(source: Source, micro_batch: MicroBatch) -> Tensor:
    """The pictures (B, 3, H, W) of a micro-batch; `InputError` for a source that has latents only."""
    pictures = source.batch(micro_batch).pictures
    if pictures is None:
        raise InputError(f"{source} gives latents; an autoencoder is trained on pictures, so give their own folder")
    return pictures


@torch.no_grad()
def latent_deviation(model: AutoencoderKL, source: Source, trainer: Trainer) -> float:
    """The standard deviation of the unscaled latents of some of the run's pictures."""
    device = next(model.parameters()).device
    micro_batches = [
        micro_batch
        for step in range(MEASURED)
        for micro_batch in trainer.plan.micro_batches(step, trainer.rank, trainer.ranks)
    ]
    latents = [
        sample_posterior(model.encode(pictures_of(source, micro_batch).to(device)), micro_batch).flatten()
        for micro_batch in micro_batches
    ]
    return float(torch.cat(latents).std())


@torch.no_grad()
def reconstruction_sheet(model: AutoencoderKL, source: Source, trainer: Trainer) -> Image.Image:
    """The same pictures each time, and below them what is decoded of their latents' means."""
    micro_batch = trainer.plan.micro_batches(0, trainer.rank, trainer.ranks)[0]
    image = pictures_of(source, micro_batch)[:SHOWN].to(next(model.parameters()).device)
    decoded = model.decode(Posterior.of(model.encode(image)).mean)
    return contact_sheet(to_pil(torch.cat([image, decoded])), len(image))


def save_autoencoder(model: LoadedModel, trainer: Trainer, source: Source | None = None) -> None:
    """The model with the averaged autoencoder as a folder `model` beside the log; scaled anew by `source`'s latents."""
    network, config, folder = model.networks.autoencoder, model.spec.autoencoder, trainer.plan.folder
    network.load_state_dict(trainer.averaged("model"))
    if trainer.rank:
        return
    if source is not None:
        config = replace(config, scaling_factor=1 / latent_deviation(network, source, trainer))
    save_model(model.with_spec(name=folder.name, autoencoder=config), folder / "model")


def _check(plan: Plan) -> None:
    """Raise `InputError` for what the adaptive weight, a comparison of whole gradients in mid-step, rules out."""
    unsupported = {"precision=fp16": plan.precision == "fp16", "parallelism=shard": plan.parallelism == "shard"}
    for setting, present in (unsupported | {"compile=true": plan.compile}).items():
        if present:
            raise InputError(f"plan.{setting} cannot train an autoencoder; take fp32 or bf16, replicated, not compiled")
