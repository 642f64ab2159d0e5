"""Adversarial diffusion distillation: what others got wrong is what is tested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill.add import AddSettings, AdversarialDistillation
from fewstep.distill.discriminator import (
    Discriminator,
    DiscriminatorInput,
    NoisyLatentFeatures,
    generator_loss,
    gradient_penalty,
    hinge,
)
from fewstep.distill.teacher import Teacher
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.models.config import Stage, UNetConfig
from fewstep.models.unet import UNet
from fewstep.train.datasets import TrajectoryBatch
from fewstep.train.diffusion import LatentBatch
from fewstep.train.forward_process import ForwardProcess, conditioning_rows
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.trainer import Trainer

CONFIG = UNetConfig(
    stages=(Stage(channels=16, resnets=1, depth=1, heads=2), Stage(channels=32, resnets=1, depth=1, heads=2)),
    context=8,
    groups=4,
)
MICRO_BATCH = MicroBatch(seed=0, step=0, whole=8, first=0, count=8)


def real_batch(micro_batch: MicroBatch) -> LatentBatch:
    return LatentBatch(micro_batch.randn("latents", 4, 8, 8), Conditioning(context=micro_batch.randn("words", 3, 8)))


def walked_batch(micro_batch: MicroBatch) -> LatentBatch:
    clean = real_batch(micro_batch)
    return clean._replace(
        trajectories=TrajectoryBatch(
            points=micro_batch.randn("points", 2, 4, 8, 8), end=micro_batch.randn("end", 4, 8, 8)
        )
    )


def distillation(settings: AddSettings | None = None, empty: Conditioning | None = None) -> AdversarialDistillation:
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    teacher = Teacher(unet, ForwardProcess(prediction="v_prediction"), empty)
    features = NoisyLatentFeatures(unet, teacher.process)
    student = copy.deepcopy(unet).requires_grad_(True)
    return AdversarialDistillation(student, teacher, features, real_batch, settings=settings or AddSettings())


def gradients(network: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None)


def test_the_adversarial_gradient_reaches_the_student_alone() -> None:
    add = distillation(AddSettings(distillation_weight=0.0))
    add.student_loss(MICRO_BATCH)["loss"].backward()
    assert gradients(add.student) > 0
    assert gradients(add.teacher.unet) == 0


def test_the_teachers_word_reaches_the_student_alone() -> None:
    add = distillation(AddSettings(adversarial_weight=0.0))
    terms = add.student_loss(MICRO_BATCH)
    terms["loss"].backward()
    assert terms["distance"] > 0
    assert gradients(add.student) > 0
    assert gradients(add.teacher.unet) == 0


def test_a_discriminator_step_leaves_the_student_and_a_student_step_the_discriminator(tmp_path: Path) -> None:
    add = distillation()
    trainer = Trainer(
        add.objectives(),
        Plan(folder=tmp_path, learning_rate=1e-3, steps=10, warmup_steps=1, batch_size=8, weight_decay=0.0),
    )
    inputs: list[list[bool]] = []

    def watched(loss: Callable[[MicroBatch], object], other: nn.Module) -> Callable[[MicroBatch], object]:
        def inner(micro_batch: MicroBatch) -> object:
            inputs.append([p.requires_grad for p in other.parameters()])
            return loss(micro_batch)

        return inner

    student, judge = trainer.states["student"], trainer.states["discriminator"]
    for state, other in ((student, add.discriminator), (judge, add.student)):
        object.__setattr__(state.objective, "loss", watched(state.objective.loss, other))
    before = copy.deepcopy([add.student.state_dict(), add.discriminator.state_dict(), add.teacher.unet.state_dict()])
    trainer.advance()
    assert not any(any(flags) for flags in inputs), "the other network takes gradients"
    after = [add.student.state_dict(), add.discriminator.state_dict(), add.teacher.unet.state_dict()]
    changed = [any(not torch.equal(old[k], new[k]) for k in old) for old, new in zip(before, after, strict=True)]
    assert changed == [True, True, False]


def test_the_last_time_step_starts_from_noise_alone_and_the_others_from_real_latents() -> None:
    for timesteps, leaks in (((249, 999), True), ((999,), False)):
        settings = AddSettings(timesteps=timesteps, timestep_probs=(1.0,) * len(timesteps))
        add = distillation(settings)
        real = real_batch(MICRO_BATCH)
        drawn = [add.generated(clean, MICRO_BATCH) for clean in (real, real._replace(x0=real.x0 + 1))]
        assert torch.equal(*drawn) is not leaks


def test_an_anchored_student_draws_from_the_noise_of_its_teachers_walk_and_is_held_to_the_end() -> None:
    add = distillation(AddSettings(timesteps=(249, 999), timestep_probs=(0.5, 0.5), regression_weight=1.0))
    clean = walked_batch(MICRO_BATCH)
    assert clean.trajectories is not None
    other = clean._replace(trajectories=clean.trajectories._replace(points=clean.trajectories.points + 1))
    changed = (add.generated(clean, MICRO_BATCH) != add.generated(other, MICRO_BATCH)).flatten(1).any(1)
    assert changed.sum() == 4, "half of the batch begins with noise alone"
    there = torch.where(changed[:, None, None, None], clean.trajectories.end, torch.full_like(clean.x0, 9.0))
    assert add.regression_loss(there, clean, MICRO_BATCH) == 0
    assert add.regression_loss(there + 1, clean, MICRO_BATCH) == pytest.approx(1)


def test_a_walked_student_starts_from_the_points_of_its_time_steps_and_all_rows_are_anchored() -> None:
    add = distillation(
        AddSettings(timesteps=(249, 999), timestep_probs=(0.5, 0.5), regression_weight=1.0, from_trajectories=True)
    )
    clean = walked_batch(MICRO_BATCH)
    assert clean.trajectories is not None
    drawn = add.generated(clean, MICRO_BATCH)
    assert torch.equal(drawn, add.generated(clean._replace(x0=clean.x0 + 1), MICRO_BATCH)), (
        "nothing of the real latents"
    )
    points = clean.trajectories.points.clone()
    points[:, 0] += 1
    to_device = clean._replace(trajectories=clean.trajectories._replace(points=points))
    assert (drawn != add.generated(to_device, MICRO_BATCH)).flatten(1).any(1).sum() == 4, (
        "half of the batch starts at 249"
    )
    assert add.regression_loss(clean.trajectories.end + 1, clean, MICRO_BATCH) == pytest.approx(1)


def test_an_anchor_without_walks_is_an_error() -> None:
    with pytest.raises(InputError, match="TrajectoryDataset"):
        distillation(AddSettings(regression_weight=1.0)).student_loss(MICRO_BATCH)


def test_r1_is_taken_at_the_features_and_trains_the_heads() -> None:
    torch.manual_seed(0)
    judge = Discriminator((16, 32), 8)
    maps = [torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)]
    _, penalty = gradient_penalty(judge, DiscriminatorInput(maps, torch.randn(4, 8)))
    penalty.backward()
    assert penalty > 0
    assert gradients(judge) > 0


def test_r1_of_a_linear_judge_is_its_squared_slope() -> None:
    class Slope(Discriminator):
        def forward(self, inputs: DiscriminatorInput) -> list[Tensor]:
            return [3.0 * maps.sum(1) for maps in inputs.maps]

    _, penalty = gradient_penalty(Slope((2,), 8), DiscriminatorInput([torch.randn(4, 2, 5, 5)], torch.zeros(4, 8)))
    assert penalty.item() == pytest.approx(2 * 25 * (3.0 / 25) ** 2)


def test_hinge_is_zero_beyond_its_margin_and_has_the_right_sign() -> None:
    logits = [torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]])]
    assert hinge(logits, 1.0) == 0
    assert hinge(logits, -1.0) == pytest.approx(2.5)
    assert generator_loss(logits) == pytest.approx(-1.5)


def test_the_words_matter_to_the_judge() -> None:
    add = distillation()
    real, conditioning = real_batch(MICRO_BATCH)[:2]
    one, other = (
        add.features(real, words, MICRO_BATCH, "real")
        for words in (conditioning, conditioning_rows(conditioning, torch.arange(8).roll(1)))
    )
    assert all(not torch.equal(a, b) for a, b in zip(one.maps[1:], other.maps[1:], strict=True))
    assert not torch.equal(one.condition, other.condition)


def test_the_distance_is_zero_where_the_teacher_agrees() -> None:
    add = distillation()
    add.process = add.teacher.process = ForwardProcess(prediction="sample")
    add.teacher.unet.forward = lambda x, t, *conditioning: torch.ones_like(x)  # type: ignore[method-assign]
    conditioning = real_batch(MICRO_BATCH).conditioning
    assert add.distance(torch.ones(8, 4, 8, 8), conditioning, MICRO_BATCH) == 0
    assert add.distance(torch.zeros(8, 4, 8, 8), conditioning, MICRO_BATCH) > 0


def test_guidance_changes_what_the_teacher_says() -> None:
    real, conditioning = real_batch(MICRO_BATCH)[:2]
    empty = Conditioning(context=torch.zeros(1, 3, 8))
    plain, guided = (
        distillation(AddSettings(guidance_scale=scale), empty=empty).distance(real, conditioning, MICRO_BATCH)
        for scale in (1.0, 4.0)
    )
    assert plain != guided


def test_a_student_learns_to_draw_in_one_step_what_its_teacher_means(tmp_path: Path) -> None:
    add = distillation(AddSettings(timesteps=(999,), timestep_probs=(1.0,), adversarial_weight=0.0))
    wanted = torch.tensor([1.0, -1.0, 0.5, 0.0])[:, None, None].expand(8, 4, 8, 8)
    add.process = add.teacher.process = ForwardProcess(prediction="sample")
    add.teacher.unet.forward = lambda x, t, *conditioning: wanted  # type: ignore[method-assign]
    before = (add.generated(real_batch(MICRO_BATCH), MICRO_BATCH) - wanted).square().mean()
    Trainer(add.objectives(), Plan(folder=tmp_path, learning_rate=2e-3, steps=25, warmup_steps=5, batch_size=8)).run()
    assert (add.generated(real_batch(MICRO_BATCH), MICRO_BATCH) - wanted).square().mean() < 0.5 * before
