"""Adversarial diffusion distillation by the features of decoded pictures, with our own network for them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill.add import AddSettings, AdversarialDistillation
from fewstep.distill.discriminator import Discriminator, DiscriminatorInput, gradient_penalty
from fewstep.distill.pixel_features import BlockNetwork, PixelFeatures, pixel_network, translate_and_cutout
from fewstep.distill.teacher import Teacher
from fewstep.distill.turbo import TurboTask
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, UNetConfig
from fewstep.models.unet import UNet
from fewstep.train.datasets import CaptionedBatch
from fewstep.train.diffusion import LatentBatch
from fewstep.train.forward_process import ForwardProcess
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.trainer import Trainer

CPU = torch.device("cpu")
UNET = UNetConfig(
    stages=(Stage(channels=16, resnets=1, depth=1, heads=2), Stage(channels=32, resnets=1, depth=1, heads=2)),
    context=8,
    groups=4,
)
AUTOENCODER = AutoencoderConfig(channels=(8, 8, 8, 8), resnets=1, groups=4, scaling_factor=0.5)
MICRO_BATCH = MicroBatch(seed=0, step=0, whole=8, first=0, count=8)
ADVERSARIAL = AddSettings(distillation_weight=0.0)


@cache
def network() -> BlockNetwork:
    return BlockNetwork(CPU)


def real_batch(micro_batch: MicroBatch) -> LatentBatch:
    return LatentBatch(micro_batch.randn("latents", 4, 4, 4), Conditioning(context=micro_batch.randn("words", 3, 8)))


def picture_features(*, augment: bool = False) -> PixelFeatures:
    tower = network()
    torch.manual_seed(0)
    return PixelFeatures(AutoencoderKL(AUTOENCODER), tower, words=8, augment=augment)


def distillation(settings: AddSettings | None = None, *, augment: bool = False) -> AdversarialDistillation:
    features = picture_features(augment=augment)
    unet = UNet(UNET)
    student = copy.deepcopy(unet).requires_grad_(True)
    teacher = Teacher(unet, ForwardProcess(prediction="v_prediction"))
    return AdversarialDistillation(student, teacher, features, real_batch, settings=settings or AddSettings())


def frozen(add: AdversarialDistillation) -> list[nn.Module]:
    assert isinstance(add.features, PixelFeatures)
    return [network().tower, add.features.autoencoder, add.teacher.unet]


def gradients(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("augment", [False, True])
def test_the_adversarial_gradient_comes_through_network_and_decoder_to_the_student(augment: bool) -> None:
    add = distillation(ADVERSARIAL, augment=augment)
    add.student_loss(MICRO_BATCH)["loss"].backward()
    assert gradients(add.student) > 0
    assert not any(parameter.grad is not None for module in frozen(add) for parameter in module.parameters())


def test_the_gradient_is_that_of_the_loss() -> None:
    add = distillation(ADVERSARIAL)
    add.discriminator.eval()  # its spectral norms stand still
    weights = next(add.student.parameters())
    loss = add.student_loss(MICRO_BATCH)["loss"]
    (slope,) = torch.autograd.grad(loss, weights)
    step = 1e-2 * slope / slope.norm()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weights += sign * step
            values.append(add.student_loss(MICRO_BATCH)["loss"])
    assert (values[0] - values[1]).item() == pytest.approx(2e-2 * slope.norm().item(), rel=0.2)  # kinks of ReLUs


def test_the_distance_is_taken_between_pictures() -> None:
    add = distillation(AddSettings(adversarial_weight=0.0, teacher_timesteps=(500, 500)))
    add.process = add.teacher.process = ForwardProcess(prediction="sample")
    add.teacher.unet.forward = lambda x, t, *conditioning: torch.ones_like(x)  # type: ignore[method-assign]
    conditioning = real_batch(MICRO_BATCH).conditioning
    drawn, wanted = torch.zeros(8, 4, 4, 4), torch.ones(8, 4, 4, 4)
    between = (add.features.view(drawn) - add.features.view(wanted)).square().mean()
    weight = add.process.alpha_bar(torch.tensor([500])).sqrt()
    assert add.distance(wanted, conditioning, MICRO_BATCH) == 0
    assert add.distance(drawn, conditioning, MICRO_BATCH).item() == pytest.approx((weight * between).item(), rel=1e-4)


def test_pictures_are_those_of_the_scaled_latents_and_never_computed_in_float16() -> None:
    features, latents = picture_features(), torch.randn(2, 4, 4, 4)
    view = features.view(latents)
    assert torch.equal(view, features.autoencoder.decode(latents / AUTOENCODER.scaling_factor))
    for kind, whole in ((torch.float16, True), (torch.bfloat16, False)):
        with torch.autocast("cpu", kind):
            assert torch.equal(features.view(latents), view) is whole


def test_the_judge_knows_the_real_picture_only_where_the_student_saw_something_of_it() -> None:
    add = distillation(AddSettings(timesteps=(499, 999), timestep_probs=(0.5, 0.5)))
    clean = real_batch(MICRO_BATCH)
    real = clean.x0
    known = add.real_embeddings(add.features.view(real), MICRO_BATCH)
    blind = known.abs().sum(1) == 0
    assert blind.sum() == 4
    torch.testing.assert_close(known[~blind], add.features.embedded(add.features.view(real))[~blind])
    drawn = [add.generated(one, MICRO_BATCH) for one in (clean, clean._replace(x0=clean.x0 + 1))]
    assert torch.equal((drawn[0] == drawn[1]).all(dim=(1, 2, 3)), blind), "blind is who began from noise alone"


def test_real_and_drawn_pictures_are_judged_by_the_same_picture_and_words() -> None:
    """Else the judge could tell them apart by what it is told."""
    add = distillation(AddSettings(mismatched_caption_weight=0.5))
    conditions: list[Tensor] = []
    add.discriminator.register_forward_pre_hook(lambda module, inputs: conditions.append(inputs[0].condition))
    add.student_loss(MICRO_BATCH)
    add.discriminator_loss(MICRO_BATCH)
    student, real, drawn, mismatched = conditions
    assert student.shape == (8, 8 + 64)
    assert torch.equal(student, real)
    assert torch.equal(student, drawn)
    assert torch.equal(student[:, 8:], mismatched[:, 8:])
    assert not torch.equal(student[:, :8], mismatched[:, :8])


def test_what_is_known_of_the_picture_matters_to_the_judge() -> None:
    add = distillation()
    maps, words = add.features(
        add.features.view(real_batch(MICRO_BATCH)[0]), real_batch(MICRO_BATCH)[1], MICRO_BATCH, "real"
    )
    one, other = (
        add.discriminator(DiscriminatorInput(maps, torch.cat([words, torch.full((8, 64), x)], 1))) for x in (0.0, 1.0)
    )
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_r1_is_taken_at_the_features() -> None:
    features = picture_features()
    real, conditioning = real_batch(MICRO_BATCH)[:2]
    view = features.view(real).requires_grad_()
    maps, words = features(view, conditioning, MICRO_BATCH, "real")
    judge = Discriminator(features.channels, features.condition)
    _, penalty = gradient_penalty(judge, DiscriminatorInput(maps, words))
    penalty.backward()
    assert penalty > 0
    assert gradients(judge) > 0
    assert view.grad is None, "not at the pictures"


def test_a_step_trains_both_and_leaves_the_frozen_as_they_are(tmp_path: Path) -> None:
    add = distillation(augment=True)
    modules = [add.student, add.discriminator, *frozen(add)]
    before = copy.deepcopy([module.state_dict() for module in modules])
    Trainer(
        add.objectives(),
        Plan(folder=tmp_path, learning_rate=1e-3, steps=1, warmup_steps=1, batch_size=8, gradient_accumulation=2),
    ).run()
    after = [module.state_dict() for module in modules]
    changed = [any(not torch.equal(old[k], new[k]) for k in old) for old, new in zip(before, after, strict=True)]
    assert changed == [True, True, False, False, False]


def test_augmented_pictures_are_moved_and_cut_each_in_its_own_way_and_always_the_same() -> None:
    pictures = torch.ones(8, 3, 32, 32, requires_grad=True)
    inputs = translate_and_cutout(pictures, MICRO_BATCH, "real")
    assert torch.equal(inputs, translate_and_cutout(pictures, MICRO_BATCH, "real"))
    assert not torch.equal(inputs, translate_and_cutout(pictures, MICRO_BATCH, "drawn"))
    assert not torch.equal(inputs[0], inputs[1])
    half = MicroBatch(seed=0, step=0, whole=8, first=4, count=4)
    assert torch.equal(inputs[4:], translate_and_cutout(pictures[4:], half, "real"))
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    gone = 1 - inputs.mean(dim=(1, 2, 3))
    assert gone.max() <= 0.25 + 0.25
    assert gone.max() > 0.2
    inputs.sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.sum() == inputs.sum()


def test_a_picture_is_moved_whole() -> None:
    ramp = torch.arange(1.0, 1025).view(1, 1, 32, 32).expand(8, 3, 32, 32)
    for before, after in zip(ramp, translate_and_cutout(ramp, MICRO_BATCH, "real"), strict=True):
        rows, columns = after[0].nonzero(as_tuple=True)
        shift = (rows * 32 + columns + 1) - after[0][rows, columns]
        assert len(shift.unique()) == 1
        assert before.max() == 1024


def test_unknown_features_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"clip-vit.*block-clip"):
        pixel_network("clip-vit", CPU)


class _Latents:
    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        return CaptionedBatch(
            captions=["a red cube"] * micro_batch.count, latents=micro_batch.randn("latents", 4, 8, 8)
        )


def test_the_task_chooses_its_features(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path, steps=1, batch_size=2, activation_checkpointing=True)
    task = TurboTask(model="blocks-base", data=_Latents(), features="block-clip", device="cpu")
    objectives = task.prepare(plan).objectives
    terms = objectives["student"].loss(MicroBatch(seed=0, step=0, whole=2, first=0, count=2))
    terms["loss"].backward()
    assert gradients(objectives["student"].network) > 0
    judge = objectives["discriminator"].network
    assert isinstance(judge, Discriminator)
    assert len(judge.heads) == len(BlockNetwork.channels)
