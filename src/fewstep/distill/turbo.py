"""Adversarial diffusion distillation as a training task: from a model to its few-step student."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fewstep.distill.add import AddSettings, AdversarialDistillation
from fewstep.distill.discriminator import FeatureExtractor, NoisyLatentFeatures
from fewstep.distill.pixel_features import PixelFeatures, pixel_network
from fewstep.distill.teacher import Teacher
from fewstep.engines.device import choose_device
from fewstep.models.unet import UNet
from fewstep.train.activation_checkpointing import checkpoint_blocks
from fewstep.train.datasets import CaptionedBatch, Prefetcher, Source
from fewstep.train.diffusion import NoisyLatents, conditioning_of, sample_sheet, save_result
from fewstep.train.forward_process import ForwardProcess
from fewstep.train.norms import norms_in_half
from fewstep.train.plan import Plan
from fewstep.train.renamed import refuses_renamed
from fewstep.train.stages import StageSetup
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class TurboTask:
    """Distil `model` into a student that samples in one to four steps without guidance.

    `student`: a model to begin from instead of the teacher itself. `features`: what the
    discriminator reads. "teacher": the teacher's own features of noisy latents (arXiv:2403.12015). The folder of a
    DINOv2, as published, or "block-clip", our own network for block pictures: features of decoded pictures, and the
    distillation loss is then one of pictures too. `augment`: translation and cutout before the discriminator.
    `discriminator_lr_multiplier` is relative to the plan's learning rate.
    """

    model: str | Path
    data: Source
    student: Path | None = None
    settings: AddSettings = field(default_factory=AddSettings)
    features: str | Path = "teacher"
    augment: bool = False
    discriminator_lr_multiplier: float = 1.0
    device: str | None = None
    sample_prompts: tuple[str, ...] = ()

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        model = load_model(self.model, dtype=torch.float32, device=choose_device(self.device))
        student = self._student(model)
        turbo = turbo_model(model).with_unet(student)
        if plan.activation_checkpointing:
            checkpoint_blocks(model.networks.autoencoder)  # gradients may pass through it
        norms_in_half(model.networks.unet, plan.precision)
        source = Prefetcher(self.data)
        noisy = NoisyLatents(model, source, caption_dropout=0.0)
        add = self.distillation(model, student, noisy)
        kind = noisy.kind if self.features == "teacher" else None  # decoders look for overflow, which waits for a card
        return StageSetup(
            objectives=add.objectives(discriminator_lr_multiplier=self.discriminator_lr_multiplier, kind=kind),
            finish=lambda trainer: save_result(turbo, trainer, student, "student"),
            sample=(lambda trainer: sample_sheet(turbo, self.sample_prompts)) if self.sample_prompts else None,
            waited_seconds=lambda: source.waited_seconds,
        )

    def distillation(self, model: LoadedModel, student: UNet, noisy: NoisyLatents) -> AdversarialDistillation:
        """The losses."""
        process = noisy.process
        teacher = Teacher(
            model.networks.unet, process, conditioning_of(model, noisy.engine, CaptionedBatch(captions=[""]))
        )
        features = self._features(model, process)
        return AdversarialDistillation(student, teacher, features, noisy.clean, settings=self.settings)

    def _features(self, model: LoadedModel, process: ForwardProcess) -> FeatureExtractor:
        if self.features == "teacher":
            return NoisyLatentFeatures(model.networks.unet, process, self.settings.discriminator_timesteps)
        network = pixel_network(self.features, choose_device(self.device))
        return PixelFeatures(model.networks.autoencoder, network, words=model.spec.unet.context, augment=self.augment)

    def _student(self, model: LoadedModel) -> UNet:
        if self.student is None:
            return copy.deepcopy(model.networks.unet).train().requires_grad_(True)
        loaded = load_model(self.student, dtype=torch.float32, device=choose_device(self.device))
        return loaded.networks.unet.train().requires_grad_(True)


def turbo_model(model: LoadedModel) -> LoadedModel:
    """The same with the defaults of a turbo model: one step from the highest level, without guidance.

    Of several steps each adds fresh noise, as with SDXL-Turbo: what one step got wrong the next does not build on.
    """
    how = "euler_ancestral"
    defaults = replace(model.spec.defaults, steps=1, guidance_scale=0.0, sampler=how, schedule="trailing")
    return model.with_spec(defaults=defaults, scheduler=model.spec.scheduler.sampled_by(how, "trailing"))
