"""Adversarial diffusion distillation: a student that draws in one to four steps (arXiv:2311.17042)."""

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
from fewstep.train.trainer import Objective


@dataclass(frozen=True, kw_only=True)
class AddSettings:
    """The published values, but where it says otherwise.

    `timesteps`: where the student starts from real latents with noise, the last from noise alone; `shares`: how often
    each. `distill`: lambda, the weight of the teacher's word. `adversarial`: 1 as published, 0 leaves the discriminator
    out. `r1`: gamma. `guidance`: the scale of the teacher's classifier-free guidance (not published; 1 is none).
    `levels`: where the teacher looks at what the student drew; `judged`: how noisy latents are when the discriminator
    sees the teacher's features of them, low for texture and high for layout. `mismatched`: how much real latents under
    another picture's words count as drawn (not published; 0 leaves them out). `anchor`: the weight of the distance,
    from noise alone, to where the teacher's whole walk led from the same noise, which keeps as many pictures of a
    prompt as the teacher has (not published here, but in arXiv:2311.18828; needs `fewstep.distill.trajectories.TrajectoryDataset`).
    `from_trajectories`: the student starts from points of these walks at all time steps, not from real latents with noise, and all
    that it draws is anchored: in several steps it comes by such points, and errors would add up (not published).
    """

    timesteps: tuple[int, ...] = (249, 499, 749, 999)
    shares: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    distill: float = 2.5
    adversarial: float = 1.0
    r1: float = 1e-5
    guidance: float = 1.0
    levels: tuple[int, int] = (20, 980)
    judged: tuple[int, int] = (0, 750)
    mismatched: float = 0.0
    anchor: float = 0.0
    from_trajectories: bool = False


class _Views(NamedTuple):
    """What the student's turn leaves to the discriminator's: views of real and drawn latents, and what to judge by."""

    real: Tensor
    drawn: Tensor
    conditioning: Conditioning
    known: Tensor


class AdversarialDistillation:
    """The student's and the discriminator's losses; the student draws once for both in a step.

    `batch(part)` gives real latents (B, 4, h, w), what they were told, and the teacher's walks if they are kept. The
    student puts out what its teacher does.
    Both losses look at the features' view: at latents, or at pictures, which are then decoded once in a step.
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
        self, *, discriminator_rate: float = 1.0, kind: Callable[[MicroBatch], Hashable] | None = None
    ) -> dict[str, Objective]:
        """What a `Trainer` trains: the student, then, unless it has no say, the discriminator; `kind` as in `Objective`."""
        objectives = {"student": Objective(network=self.student, loss=self.student_loss, kind=kind)}
        if self.settings.adversarial:
            objectives["discriminator"] = Objective(
                network=self.discriminator,
                loss=self.discriminator_loss,
                rate=discriminator_rate,
                betas=(0.0, 0.99),
                kind=kind,
            )
        return objectives

    def student_loss(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Adversarial loss plus lambda times the distance to the teacher."""
        micro_batch = micro_batch.on(self.device)
        clean = self.batch(micro_batch)
        real, conditioning = clean.x0, clean.conditioning
        drawn = self.drawn(clean, micro_batch)
        view = self.features.view(drawn)
        adversarial = distance = regression_loss = drawn.new_zeros(())
        if self.settings.adversarial:
            views = self._gathered(real, view, conditioning, micro_batch)
            self._views = {other: old for other, old in self._views.items() if other.step == micro_batch.step}
            self._views[micro_batch] = views
            adversarial = generator_loss(self.discriminator(self._seen(view, views, micro_batch, "student")))
        if self.settings.distill:
            distance = self.distance(drawn, conditioning, micro_batch, view=view)
        if self.settings.anchor:
            regression_loss = self.regression_loss(drawn, clean, micro_batch)
        loss = (
            self.settings.adversarial * adversarial
            + self.settings.distill * distance
            + self.settings.anchor * regression_loss
        )
        terms = {"fooled": adversarial, "distance": distance, "astray": regression_loss}
        return {"loss": loss, **terms, "spread": drawn.detach().std()}

    def discriminator_loss(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Hinge losses of real and drawn latents, and gamma times R1 of the real ones."""
        micro_batch = micro_batch.on(self.device)
        views = self._views[micro_batch]
        with torch.no_grad():
            seen_real = self._seen(views.real, views, micro_batch, "real")
            seen_drawn = self._seen(views.drawn, views, micro_batch, "drawn")
        of_real, penalty = gradient_penalty(self.discriminator, seen_real)
        of_drawn = self.discriminator(seen_drawn)
        false = hinge(of_drawn, -1.0)
        if self.settings.mismatched:
            false = (false + self.settings.mismatched * self._mismatched(views, micro_batch)) / (
                1 + self.settings.mismatched
            )
        loss = hinge(of_real, 1.0) + false + self.settings.r1 * penalty
        said = {"real": _mean(of_real), "drawn": _mean(of_drawn), "r1": penalty}
        return {"loss": loss, **said}

    def drawn(self, clean: LatentBatch, micro_batch: MicroBatch) -> Tensor:
        """What the student makes in one step of real latents with noise, or at the last time step of noise alone.

        That is the noise that the teacher's walk began with, where it is known.
        """
        t, alone = self._begun(micro_batch)
        x = self._first(clean, t, alone, micro_batch)
        return self.process.x0(predicted(self.student, x, t, clean.conditioning), x, t)

    def regression_loss(self, drawn: Tensor, clean: LatentBatch, micro_batch: MicroBatch) -> Tensor:
        """Mean squared distance to the ends of the teacher's walks, of what was drawn from their noise or points."""
        _, alone = self._begun(micro_batch)
        error = (drawn - _trajectories_of(clean).end).square().mean((1, 2, 3))
        return error.mean() if self.settings.from_trajectories else (error * alone).sum() / alone.sum().clamp(min=1)

    @torch.no_grad()
    def known(self, real: Tensor, micro_batch: MicroBatch) -> Tensor:
        """What is in views of real latents, (B, embedding); 0 where the student began from noise alone."""
        _, alone = self._begun(micro_batch)
        return self.features.embedded(real) * ~alone[:, None]

    def distance(
        self, drawn: Tensor, conditioning: Conditioning, micro_batch: MicroBatch, *, view: Tensor | None = None
    ) -> Tensor:
        """How far the teacher's denoising of drawn latents leads from them: mean of `c(t) |x0 - teacher's|^2`.

        `c(t) = sqrt(alpha_bar)`, the published "exponential" weight; no gradient through the teacher.
        `view`: the features' view of `drawn`, where it is known already.
        """
        micro_batch, view = micro_batch.on(self.device), self.features.view(drawn) if view is None else view
        low, high = self.settings.levels
        t = (low + (high - low) * micro_batch.rand("teacher t")).long()
        eps = micro_batch.randn("teacher noise", *drawn.shape[1:])
        with torch.no_grad():
            x0 = self.teacher.x0(self.process.noised(drawn, eps, t), t, conditioning, self.settings.guidance)
            wanted = self.features.view(x0)
        weight = self.process.alpha_bar(t).sqrt()
        return (weight * (view - wanted).square()).mean()

    def _first(self, clean: LatentBatch, t: Tensor, alone: Tensor, micro_batch: MicroBatch) -> Tensor:
        """The latents with noise that the student starts from."""
        real = clean.x0
        if self.settings.from_trajectories:
            places = torch.searchsorted(self._times, t)
            return _trajectories_of(clean).points[torch.arange(len(t), device=t.device), places]
        eps = micro_batch.on(self.device).randn("student noise", *real.shape[1:])
        noise = eps if clean.trajectories is None else clean.trajectories.points[:, -1]
        return torch.where(alone[:, None, None, None], noise, self.process.noised(real, eps, t))

    def _begun(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The time steps (B,) that the student begins at, and where that is noise alone."""
        shares, micro_batch = self.settings.shares, micro_batch.on(self.device)
        t = self._times[micro_batch.rows("student t", lambda count, generator: _balanced(shares, count, generator))]
        return t, t == self.settings.timesteps[-1]

    @torch.no_grad()
    def _gathered(self, real: Tensor, drawn: Tensor, conditioning: Conditioning, micro_batch: MicroBatch) -> _Views:
        """From real latents and the view of drawn ones."""
        view = self.features.view(real)
        return _Views(view, drawn.detach(), conditioning, self.known(view, micro_batch))

    def _seen(self, view: Tensor, views: _Views, micro_batch: MicroBatch, purpose: str) -> DiscriminatorInput:
        maps, words = self.features(view, views.conditioning, micro_batch, purpose)
        return DiscriminatorInput(maps, torch.cat([words, views.known], dim=1))

    def _mismatched(self, views: _Views, micro_batch: MicroBatch) -> Tensor:
        others = conditioning_rows(views.conditioning, torch.arange(len(views.real), device=self.device).roll(1))
        with torch.no_grad():
            inputs = self._seen(views.real, views._replace(conditioning=others), micro_batch, "mismatched")
        return hinge(self.discriminator(inputs), -1.0)


def _trajectories_of(clean: LatentBatch) -> TrajectoryBatch:
    if clean.trajectories is None:
        raise InputError(
            "there are no walks of the teacher; give `fewstep.distill.trajectories.TrajectoryDataset` as data"
        )
    return clean.trajectories


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack([logit.detach().mean() for logit in logits]).mean()


def _balanced(shares: tuple[float, ...], count: int, generator: torch.Generator) -> Tensor:
    """(count,) indices, each as often as its share says, to within one, in random order."""
    places = (torch.arange(count) + torch.rand((), generator=generator)) / count
    edges = torch.tensor(shares).cumsum(0)[:-1] / sum(shares)
    return torch.bucketize(places, edges, right=True)[torch.randperm(count, generator=generator)]
