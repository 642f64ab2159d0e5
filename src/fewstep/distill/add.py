"""Adversarial diffusion distillation: a student that draws in one to four steps (arXiv:2311.17042)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.distill.discriminator import Discriminator, Features, Seen, fooled, gradient_penalty, hinge
from fewstep.distill.teacher import Teacher
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.models.unet import UNet
from fewstep.train.datasets import Walked
from fewstep.train.diffusion import Clean
from fewstep.train.forward_process import of_rows, predicted
from fewstep.train.plan import Part
from fewstep.train.trainer import Turn


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
    prompt as the teacher has (not published here, but in arXiv:2311.18828; needs `fewstep.distill.trajectories.Walks`).
    `walked`: the student starts from points of these walks at all time steps, not from real latents with noise, and all
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
    walked: bool = False


class _Evidence(NamedTuple):
    """What the student's turn leaves to the discriminator's: views of real and drawn latents, and what to judge by."""

    real: Tensor
    drawn: Tensor
    told: Conditioning
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
        features: Features,
        batch: Callable[[Part], Clean],
        *,
        settings: AddSettings,
    ) -> None:
        self.student, self.teacher, self.features, self.batch = student, teacher, features, batch
        self.settings, self.process = settings, teacher.process
        self.device = next(student.parameters()).device
        self.discriminator = Discriminator(features.channels, features.condition + features.embedding).to(self.device)
        self._times = torch.tensor(settings.timesteps, device=self.device)
        self._evidence: dict[Part, _Evidence] = {}

    def turns(
        self, *, discriminator_rate: float = 1.0, kind: Callable[[Part], Hashable] | None = None
    ) -> dict[str, Turn]:
        """What a `Trainer` trains: the student, then, unless it has no say, the discriminator; `kind` as in `Turn`."""
        turns = {"student": Turn(network=self.student, loss=self.student_loss, kind=kind)}
        if self.settings.adversarial:
            turns["discriminator"] = Turn(
                network=self.discriminator,
                loss=self.discriminator_loss,
                rate=discriminator_rate,
                betas=(0.0, 0.99),
                kind=kind,
            )
        return turns

    def student_loss(self, part: Part) -> dict[str, Tensor]:
        """Adversarial loss plus lambda times the distance to the teacher."""
        part = part.on(self.device)
        clean = self.batch(part)
        real, told = clean.x0, clean.told
        drawn = self.drawn(clean, part)
        view = self.features.view(drawn)
        fool = distance = astray = drawn.new_zeros(())
        if self.settings.adversarial:
            evidence = self._gathered(real, view, told, part)
            self._evidence = {other: old for other, old in self._evidence.items() if other.step == part.step}
            self._evidence[part] = evidence
            fool = fooled(self.discriminator(self._seen(view, evidence, part, "student")))
        if self.settings.distill:
            distance = self.distance(drawn, told, part, view=view)
        if self.settings.anchor:
            astray = self.astray(drawn, clean, part)
        loss = self.settings.adversarial * fool + self.settings.distill * distance + self.settings.anchor * astray
        terms = {"fooled": fool, "distance": distance, "astray": astray}
        return {"loss": loss, **terms, "spread": drawn.detach().std()}

    def discriminator_loss(self, part: Part) -> dict[str, Tensor]:
        """Hinge losses of real and drawn latents, and gamma times R1 of the real ones."""
        part = part.on(self.device)
        evidence = self._evidence[part]
        with torch.no_grad():
            seen_real = self._seen(evidence.real, evidence, part, "real")
            seen_drawn = self._seen(evidence.drawn, evidence, part, "drawn")
        of_real, penalty = gradient_penalty(self.discriminator, seen_real)
        of_drawn = self.discriminator(seen_drawn)
        false = hinge(of_drawn, -1.0)
        if self.settings.mismatched:
            false = (false + self.settings.mismatched * self._mismatched(evidence, part)) / (
                1 + self.settings.mismatched
            )
        loss = hinge(of_real, 1.0) + false + self.settings.r1 * penalty
        said = {"real": _mean(of_real), "drawn": _mean(of_drawn), "r1": penalty}
        return {"loss": loss, **said}

    def drawn(self, clean: Clean, part: Part) -> Tensor:
        """What the student makes in one step of real latents with noise, or at the last time step of noise alone.

        That is the noise that the teacher's walk began with, where it is known.
        """
        t, alone = self._begun(part)
        x = self._first(clean, t, alone, part)
        return self.process.x0(predicted(self.student, x, t, clean.told), x, t)

    def astray(self, drawn: Tensor, clean: Clean, part: Part) -> Tensor:
        """Mean squared distance to the ends of the teacher's walks, of what was drawn from their noise or points."""
        _, alone = self._begun(part)
        error = (drawn - _walks_of(clean).end).square().mean((1, 2, 3))
        return error.mean() if self.settings.walked else (error * alone).sum() / alone.sum().clamp(min=1)

    @torch.no_grad()
    def known(self, real: Tensor, part: Part) -> Tensor:
        """What is in views of real latents, (B, embedding); 0 where the student began from noise alone."""
        _, alone = self._begun(part)
        return self.features.embedded(real) * ~alone[:, None]

    def distance(self, drawn: Tensor, told: Conditioning, part: Part, *, view: Tensor | None = None) -> Tensor:
        """How far the teacher's denoising of drawn latents leads from them: mean of `c(t) |x0 - teacher's|^2`.

        `c(t) = sqrt(alpha_bar)`, the published "exponential" weight; no gradient through the teacher.
        `view`: the features' view of `drawn`, where it is known already.
        """
        part, view = part.on(self.device), self.features.view(drawn) if view is None else view
        low, high = self.settings.levels
        t = (low + (high - low) * part.rand("teacher t")).long()
        eps = part.randn("teacher noise", *drawn.shape[1:])
        with torch.no_grad():
            x0 = self.teacher.x0(self.process.noised(drawn, eps, t), t, told, self.settings.guidance)
            wanted = self.features.view(x0)
        weight = self.process.alpha_bar(t).sqrt()
        return (weight * (view - wanted).square()).mean()

    def _first(self, clean: Clean, t: Tensor, alone: Tensor, part: Part) -> Tensor:
        """The latents with noise that the student starts from."""
        real = clean.x0
        if self.settings.walked:
            places = torch.searchsorted(self._times, t)
            return _walks_of(clean).points[torch.arange(len(t), device=t.device), places]
        eps = part.on(self.device).randn("student noise", *real.shape[1:])
        noise = eps if clean.walked is None else clean.walked.points[:, -1]
        return torch.where(alone[:, None, None, None], noise, self.process.noised(real, eps, t))

    def _begun(self, part: Part) -> tuple[Tensor, Tensor]:
        """The time steps (B,) that the student begins at, and where that is noise alone."""
        shares, part = self.settings.shares, part.on(self.device)
        t = self._times[part.rows("student t", lambda count, generator: _balanced(shares, count, generator))]
        return t, t == self.settings.timesteps[-1]

    @torch.no_grad()
    def _gathered(self, real: Tensor, drawn: Tensor, told: Conditioning, part: Part) -> _Evidence:
        """From real latents and the view of drawn ones."""
        view = self.features.view(real)
        return _Evidence(view, drawn.detach(), told, self.known(view, part))

    def _seen(self, view: Tensor, evidence: _Evidence, part: Part, purpose: str) -> Seen:
        maps, words = self.features(view, evidence.told, part, purpose)
        return Seen(maps, torch.cat([words, evidence.known], dim=1))

    def _mismatched(self, evidence: _Evidence, part: Part) -> Tensor:
        others = of_rows(evidence.told, torch.arange(len(evidence.real), device=self.device).roll(1))
        with torch.no_grad():
            seen = self._seen(evidence.real, evidence._replace(told=others), part, "mismatched")
        return hinge(self.discriminator(seen), -1.0)


def _walks_of(clean: Clean) -> Walked:
    if clean.walked is None:
        raise InputError("there are no walks of the teacher; give `fewstep.distill.trajectories.Walks` as data")
    return clean.walked


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack([logit.detach().mean() for logit in logits]).mean()


def _balanced(shares: tuple[float, ...], count: int, generator: torch.Generator) -> Tensor:
    """(count,) indices, each as often as its share says, to within one, in random order."""
    places = (torch.arange(count) + torch.rand((), generator=generator)) / count
    edges = torch.tensor(shares).cumsum(0)[:-1] / sum(shares)
    return torch.bucketize(places, edges, right=True)[torch.randperm(count, generator=generator)]
