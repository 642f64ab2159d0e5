"""Adversarial diffusion distillation: the losses of a student of one to four steps (arXiv:2311.17042)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.distill.discriminator import (
    Discriminator,
    DiscriminatorInput,
    FeatureExtractor,
    generator_loss,
    gradient_penalty,
    hinge,
)
from fewstep.distill.teacher import Teacher
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.models.unet import UNet
from fewstep.train.datasets import TrajectoryBatch
from fewstep.train.diffusion import LatentBatch
from fewstep.train.forward_process import conditioning_rows, predicted
from fewstep.train.plan import MicroBatch
from fewstep.train.renamed import refuses_renamed
from fewstep.train.trainer import Objective


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class AddSettings:
    """Settings of the losses; the defaults are the published ones unless said otherwise.

    `timesteps`: where the student starts from noised real latents; at the last one it starts from noise alone.
    `timestep_probs`: how often each is generated. `distillation_weight`: lambda, weight of the distillation loss.
    `adversarial_weight`: of the generator loss; 0 trains no discriminator. `r1_weight`: gamma, weight of the R1
    penalty. `guidance_scale`: of the teacher (not published; 1 is no guidance). `teacher_timesteps` (low, high): range
    of t at which the teacher denoises the student's latents. `discriminator_timesteps` (low, high): range of t of
    `NoisyLatentFeatures`; low judges texture, high layout. `mismatched_caption_weight`: weight of real latents under
    another caption, as negatives of the discriminator (not published; 0 leaves them out). `regression_weight`: weight
    of the squared distance, from noise alone, to the end of the teacher's trajectory from the same noise, which keeps
    the teacher's diversity (arXiv:2311.18828); it needs `fewstep.distill.trajectories.TrajectoryDataset`.
    `from_trajectories`: the student starts from points of these trajectories at all time steps, not from noised real
    latents, and the regression loss counts at all of them: in several steps errors would add up (not published).
    """

    timesteps: tuple[int, ...] = (249, 499, 749, 999)
    timestep_probs: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    distillation_weight: float = 2.5
    adversarial_weight: float = 1.0
    r1_weight: float = 1e-5
    guidance_scale: float = 1.0
    teacher_timesteps: tuple[int, int] = (20, 980)
    discriminator_timesteps: tuple[int, int] = (0, 750)
    mismatched_caption_weight: float = 0.0
    regression_weight: float = 0.0
    from_trajectories: bool = False


class _Views(NamedTuple):
    """What the student's loss leaves to the discriminator's: views of real and generated latents, and conditions."""

    real: Tensor
    generated: Tensor
    conditioning: Conditioning
    known: Tensor


class AdversarialDistillation:
    """The student's and the discriminator's losses; the student generates once for both in a step.

    `batch(micro_batch)` gives real latents (B, 4, h, w), their conditioning, and the teacher's trajectories if
    there are any. Student and teacher have the same parameterisation.
    Both losses read the features' view: latents, or pictures, which are then decoded once in a step.
    """

    def __init__(
        self,
        student: UNet,
        teacher: Teacher,
        features: FeatureExtractor,
        batch: Callable[[MicroBatch], LatentBatch],
        *,
        settings: AddSettings,
    ) -> None:
        self.student, self.teacher, self.features, self.batch = student, teacher, features, batch
        self.settings, self.process = settings, teacher.process
        self.device = next(student.parameters()).device
        self.discriminator = Discriminator(features.channels, features.condition + features.embedding).to(self.device)
        self._times = torch.tensor(settings.timesteps, device=self.device)
        self._views: dict[MicroBatch, _Views] = {}

    def objectives(
        self, *, discriminator_lr_multiplier: float = 1.0, kind: Callable[[MicroBatch], Hashable] | None = None
    ) -> dict[str, Objective]:
        """The student's objective, then the discriminator's unless its weight is 0; `kind` as in `Objective`."""
        objectives = {"student": Objective(network=self.student, loss=self.student_loss, kind=kind)}
        if self.settings.adversarial_weight:
            objectives["discriminator"] = Objective(
                network=self.discriminator,
                loss=self.discriminator_loss,
                lr_multiplier=discriminator_lr_multiplier,
                betas=(0.0, 0.99),
                kind=kind,
            )
        return objectives

    def student_loss(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Weighted sum of the generator, distillation and regression losses."""
        micro_batch = micro_batch.on(self.device)
        clean = self.batch(micro_batch)
        real, conditioning = clean.x0, clean.conditioning
        generated = self.generated(clean, micro_batch)
        view = self.features.view(generated)
        adversarial = distance = regression_loss = generated.new_zeros(())
        if self.settings.adversarial_weight:
            views = self._views_of(real, view, conditioning, micro_batch)
            self._views = {other: old for other, old in self._views.items() if other.step == micro_batch.step}
            self._views[micro_batch] = views
            adversarial = generator_loss(self.discriminator(self._inputs(view, views, micro_batch, "student")))
        if self.settings.distillation_weight:
            distance = self.distance(generated, conditioning, micro_batch, view=view)
        if self.settings.regression_weight:
            regression_loss = self.regression_loss(generated, clean, micro_batch)
        loss = (
            self.settings.adversarial_weight * adversarial
            + self.settings.distillation_weight * distance
            + self.settings.regression_weight * regression_loss
        )
        terms = {"generator_loss": adversarial, "distance": distance, "regression_loss": regression_loss}
        return {"loss": loss, **terms, "spread": generated.detach().std()}

    def discriminator_loss(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Hinge losses of real and generated latents, and gamma times R1 of the real ones."""
        micro_batch = micro_batch.on(self.device)
        views = self._views[micro_batch]
        with torch.no_grad():
            inputs_real = self._inputs(views.real, views, micro_batch, "real")
            inputs_generated = self._inputs(views.generated, views, micro_batch, "drawn")
        of_real, penalty = gradient_penalty(self.discriminator, inputs_real)
        of_generated = self.discriminator(inputs_generated)
        false = hinge(of_generated, -1.0)
        if self.settings.mismatched_caption_weight:
            false = (false + self.settings.mismatched_caption_weight * self._mismatched(views, micro_batch)) / (
                1 + self.settings.mismatched_caption_weight
            )
        loss = hinge(of_real, 1.0) + false + self.settings.r1_weight * penalty
        terms = {"real": _mean(of_real), "drawn": _mean(of_generated), "r1": penalty}
        return {"loss": loss, **terms}

    def generated(self, clean: LatentBatch, micro_batch: MicroBatch) -> Tensor:
        """The student's x0 (B, 4, h, w) in one step from noised real latents, or from noise alone at the last step.

        That noise is the one that the teacher's trajectory began with, where there is one.
        """
        t, alone = self._start_times(micro_batch)
        x = self._start(clean, t, alone, micro_batch)
        return self.process.x0(predicted(self.student, x, t, clean.conditioning), x, t)

    def regression_loss(self, generated: Tensor, clean: LatentBatch, micro_batch: MicroBatch) -> Tensor:
        """Mean squared distance to the ends of the teacher's trajectories, from their noise or their points."""
        _, alone = self._start_times(micro_batch)
        error = (generated - _trajectories_of(clean).end).square().mean((1, 2, 3))
        return error.mean() if self.settings.from_trajectories else (error * alone).sum() / alone.sum().clamp(min=1)

    @torch.no_grad()
    def real_embeddings(self, real: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Embeddings (B, embedding) of views of real latents; 0 where the student starts from noise alone."""
        _, alone = self._start_times(micro_batch)
        return self.features.embedded(real) * ~alone[:, None]

    def distance(
        self, generated: Tensor, conditioning: Conditioning, micro_batch: MicroBatch, *, view: Tensor | None = None
    ) -> Tensor:
        """The distillation loss: mean of `c(t) |x0 - teacher's x0|^2` over noised student latents.

        `c(t) = sqrt(alpha_bar)`, the published "exponential" weight; no gradient through the teacher.
        `view`: the features' view of `generated`, where it is known already.
        """
        micro_batch, view = micro_batch.on(self.device), self.features.view(generated) if view is None else view
        low, high = self.settings.teacher_timesteps
        t = (low + (high - low) * micro_batch.rand("teacher t")).long()
        eps = micro_batch.randn("teacher noise", *generated.shape[1:])
        with torch.no_grad():
            x0 = self.teacher.x0(self.process.noised(generated, eps, t), t, conditioning, self.settings.guidance_scale)
            target = self.features.view(x0)
        weight = self.process.alpha_bar(t).sqrt()
        return (weight * (view - target).square()).mean()

    def _start(self, clean: LatentBatch, t: Tensor, alone: Tensor, micro_batch: MicroBatch) -> Tensor:
        """The noised latents that the student starts from."""
        real = clean.x0
        if self.settings.from_trajectories:
            places = torch.searchsorted(self._times, t)
            return _trajectories_of(clean).points[torch.arange(len(t), device=t.device), places]
        eps = micro_batch.on(self.device).randn("student noise", *real.shape[1:])
        noise = eps if clean.trajectories is None else clean.trajectories.points[:, -1]
        return torch.where(alone[:, None, None, None], noise, self.process.noised(real, eps, t))

    def _start_times(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The time steps (B,) that the student begins at, and where that is noise alone."""
        probs, micro_batch = self.settings.timestep_probs, micro_batch.on(self.device)
        t = self._times[micro_batch.rows("student t", lambda count, generator: _balanced(probs, count, generator))]
        return t, t == self.settings.timesteps[-1]

    @torch.no_grad()
    def _views_of(self, real: Tensor, generated: Tensor, conditioning: Conditioning, micro_batch: MicroBatch) -> _Views:
        """From real latents and the view of generated ones."""
        view = self.features.view(real)
        return _Views(view, generated.detach(), conditioning, self.real_embeddings(view, micro_batch))

    def _inputs(self, view: Tensor, views: _Views, micro_batch: MicroBatch, purpose: str) -> DiscriminatorInput:
        maps, words = self.features(view, views.conditioning, micro_batch, purpose)
        return DiscriminatorInput(maps, torch.cat([words, views.known], dim=1))

    def _mismatched(self, views: _Views, micro_batch: MicroBatch) -> Tensor:
        others = conditioning_rows(views.conditioning, torch.arange(len(views.real), device=self.device).roll(1))
        with torch.no_grad():
            inputs = self._inputs(views.real, views._replace(conditioning=others), micro_batch, "mismatched")
        return hinge(self.discriminator(inputs), -1.0)


def _trajectories_of(clean: LatentBatch) -> TrajectoryBatch:
    if clean.trajectories is None:
        raise InputError(
            "there are no trajectories of the teacher; give `fewstep.distill.trajectories.TrajectoryDataset` as data"
        )
    return clean.trajectories


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack([logit.detach().mean() for logit in logits]).mean()


def _balanced(probs: tuple[float, ...], count: int, generator: torch.Generator) -> Tensor:
    """(count,) indices, each as often as its probability says, to within one, in random order."""
    places = (torch.arange(count) + torch.rand((), generator=generator)) / count
    edges = torch.tensor(probs).cumsum(0)[:-1] / sum(probs)
    return torch.bucketize(places, edges, right=True)[torch.randperm(count, generator=generator)]
