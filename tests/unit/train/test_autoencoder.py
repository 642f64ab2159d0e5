"""Autoencoder training: its losses, the adversary and its start, exact resume, what is left behind, TensorBoard."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError, InputError, MissingExtraError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, UNetConfig
from fewstep.models.unet import UNet
from fewstep.train.autoencoder import AutoencoderTask, PerceptualDistance, Reconstruction, divergence, sample_posterior
from fewstep.train.datasets import CaptionedBatch
from fewstep.train.overrides import overridden
from fewstep.train.patchgan import PatchDiscriminator, adaptive_weight, hinge_loss
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.recipe import recipe_stages
from fewstep.train.stages import RecipeStage, run_stage
from fewstep.train.trainer import Trainer
from fewstep.weights.load import load_model
from fewstep.weights.save import save_model

TINY = AutoencoderConfig(channels=(8, 8), resnets=1, groups=4, scaling_factor=1.0)
SIZE = 24
SMALL: dict[str, Any] = {"discriminator_start": 0, "discriminator_width": 4}
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Pictures of a colour above its opposite."""

    latents: bool = False

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        colours = (2 * micro_batch.rand("colours", 3, 1, 1) - 1).sign().expand(-1, -1, SIZE // 2, SIZE)
        pictures = 0.8 * torch.cat([colours, -colours], 2)
        named = {"latents": pictures} if self.latents else {"pictures": pictures}
        return CaptionedBatch(captions=[""] * micro_batch.count, **named)


def micro_batch_of(count: int = 4, *, step: int = 0, first: int = 0, whole: int = 4) -> MicroBatch:
    return MicroBatch(seed=0, step=step, whole=whole, first=first, count=count)


def task(model: str | Path = "", **options: Any) -> AutoencoderTask:
    return AutoencoderTask(**(SMALL | {"model": model, "data": Halves(), "device": "cpu"} | options))


def lesson(**options: Any) -> Reconstruction:
    torch.manual_seed(0)
    return Reconstruction(AutoencoderKL(TINY), Halves(), task(**options))


def trainer_of(folder: Path, made: Reconstruction, **options: Any) -> Trainer:
    plan = Plan(
        **(
            {"folder": folder, "steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "log_steps": 1}
            | options
        )
    )
    return Trainer(made.objectives(), plan)


def gradients(network: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def weights(trainer: Trainer) -> list[Tensor]:
    return [w for state in trainer.states.values() for w in (*state.network.state_dict().values(), *state.ema.averages)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a tiny autoencoder."""
    model = load_model("blocks-base", dtype=torch.float32)
    stage = Stage(channels=8, resnets=1, depth=1, heads=2)
    unet = UNet(UNetConfig(stages=(stage,), context=model.spec.unet.context, groups=4))
    path = tmp_path_factory.mktemp("start") / "model"
    networks = replace(model.networks, autoencoder=AutoencoderKL(TINY))
    save_model(model.with_spec(autoencoder=TINY)._replace(networks=networks).with_unet(unet), path)
    return path


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A perceptual network as a user may have one."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)

        def forward(self, x: Tensor) -> list[Tensor]:
            first = self.first(x).relu()
            return [first, self.second(first)]

    torch.jit.script(Two()).save(str(tmp_path / "features.pt"))
    return tmp_path / "features.pt"


def test_the_adversary_moves_the_model_in_the_model_s_turn_alone() -> None:
    with_adversary, without = lesson(), lesson(discriminator_weight=0.0)
    with_adversary.discriminator.requires_grad_(False)
    for made in (with_adversary, without):
        made.model_loss(micro_batch_of())["loss"].backward()
    pulled, alone = (gradients(made.model.decoder) for made in (with_adversary, without))
    assert not any(torch.equal(a, b) for a, b in zip(pulled, alone, strict=True) if a is not None and b is not None)
    with_adversary.model.zero_grad()
    with_adversary.discriminator.requires_grad_(True)
    with_adversary.discriminator_loss(micro_batch_of())["loss"].backward()
    assert all(gradient is None for gradient in gradients(with_adversary.model))
    assert all(gradient is not None for gradient in gradients(with_adversary.discriminator))


def test_without_a_weight_there_is_no_discriminator() -> None:
    assert set(lesson(discriminator_weight=0.0).objectives()) == {"model"}


def test_the_adaptive_weight_makes_both_pull_alike_up_to_a_limit() -> None:
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(layer.square().sum(), 0.25 * layer.sum(), layer)
    assert weight.item() == pytest.approx(10 / (0.25 * 2**0.5), rel=1e-3)
    assert not weight.requires_grad
    assert adaptive_weight(layer.square().sum(), 0 * layer.sum(), layer) == 1e4


def test_the_weighted_adversary_pulls_at_the_last_layer_as_hard_as_its_share_says() -> None:
    pulls = []
    for share in (0.5, 0.0):
        made = lesson(kl_weight=0.0, discriminator_weight=share)
        loss = made.model_loss(micro_batch_of())["loss"]
        pulls.append(torch.autograd.grad(loss, made.model.decoder.conv_out.weight)[0])
    whole, error = pulls
    torch.testing.assert_close((whole - error).norm(), 0.5 * error.norm(), rtol=0.05, atol=0.0)


def test_the_hinge_is_zero_where_all_is_told_with_a_margin() -> None:
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.zeros(2), torch.zeros(2)) == 1
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([1.0])) == 2


def test_the_discriminator_learns_to_tell_noise_from_pictures() -> None:
    network = PatchDiscriminator(width=4)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)

    def logits(step: int) -> tuple[Tensor, Tensor]:
        pictures = Halves().batch(micro_batch_of(step=step)).pictures
        assert pictures is not None
        return network(pictures), network(torch.rand_like(pictures) * 2 - 1)

    for step in range(20):
        optimizer.zero_grad()
        hinge_loss(*logits(step)).backward()
        optimizer.step()
    with torch.no_grad():
        real, noise = logits(99)
    assert real.min() > noise.max()


def test_the_discriminator_has_the_published_shape() -> None:
    network = PatchDiscriminator()
    assert network(torch.zeros(2, 3, 64, 48)).shape == (2, 1, 6, 4)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_is_bit_equal_before_and_after_the_discriminator_starts(tmp_path: Path, stop: int) -> None:
    def trainer(name: str) -> Trainer:
        return trainer_of(tmp_path / name, lesson(discriminator_start=3))

    whole, first = trainer("whole"), trainer("model")
    for _ in range(5):
        whole.advance()
    for _ in range(stop):
        first.advance()
    first.save()
    resumed = trainer("model")
    for _ in range(5 - stop):
        resumed.advance()
    assert resumed.step == 5
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_before_its_start_the_discriminator_neither_learns_nor_pulls(tmp_path: Path) -> None:
    made = lesson(discriminator_start=1)
    trainer = trainer_of(tmp_path, made)
    before = [p.clone() for p in made.discriminator.parameters()]
    trainer.advance()
    assert "generator_loss" not in made.model_loss(micro_batch_of())
    assert all(torch.equal(a, b) for a, b in zip(before, made.discriminator.parameters(), strict=True))
    trainer.advance()
    assert not all(torch.equal(a, b) for a, b in zip(before, made.discriminator.parameters(), strict=True))
    assert "model.generator_loss" in (tmp_path / "log.jsonl").read_text().splitlines()[1]


def test_a_part_of_a_batch_has_its_share_of_the_loss() -> None:
    made = lesson(discriminator_weight=0.0)
    whole = made.model_loss(micro_batch_of())["loss"]
    halves = [made.model_loss(micro_batch_of(2, first=first))["loss"] for first in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_latents_and_their_divergence() -> None:
    assert divergence(torch.zeros(2, 8, 3, 3)) == 0
    mean, log_variance = (torch.full((1, 4, 32, 32), value) for value in (2.0, 2 * math.log(0.5)))
    moments = torch.cat([mean, log_variance], 1)
    latents = sample_posterior(moments, micro_batch_of(1, whole=1))
    assert latents.mean() == pytest.approx(2.0, abs=0.05)
    assert latents.std() == pytest.approx(0.5, abs=0.05)
    normal = torch.distributions.Normal(2.0, 0.5)
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(divergence(moments), exact * 4 * 32 * 32)


def test_a_fresh_autoencoder_learns_and_is_saved_in_its_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "vae"
    plan = Plan(
        folder=out,
        steps=40,
        batch_size=4,
        learning_rate=5e-3,
        warmup_steps=0,
        ema_decay=0.9,
        log_steps=40,
        sample_steps=20,
    )
    setup = task(folder, fresh=True, rescale=True, discriminator_start=38)
    before = setup.prepare(plan).objectives["model"].loss(micro_batch_of())["l1"]
    run_stage(RecipeStage(task=setup, plan=plan))
    trained = load_model(out / "model", dtype=torch.float32).networks.autoencoder
    pictures = Halves().batch(micro_batch_of(16, step=77, whole=16)).pictures
    assert pictures is not None
    with torch.no_grad():
        latents = sample_posterior(trained.encode(pictures), micro_batch_of(16, whole=16))
        assert (trained.decode(latents) - pictures).abs().mean() < 0.75 * before
    assert (trained.config.scaling_factor * latents).std().item() == pytest.approx(1, abs=0.2)
    assert (out / "sample-00000040.png").is_file()


def test_the_decoder_alone_learns_where_latents_must_stay(folder: Path, tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path / "decoder", steps=2, batch_size=4, learning_rate=1e-2, warmup_steps=0, ema_decay=0.0)
    run_stage(RecipeStage(task=task(folder, decoder_only=True), plan=plan))
    before, after = (load_model(path, dtype=torch.float32) for path in (folder, tmp_path / "decoder" / "model"))
    changed = {
        name.split(".")[0]
        for name, value in after.networks.autoencoder.state_dict().items()
        if not torch.equal(value, before.networks.autoencoder.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert after.spec.name == "decoder"


def test_the_perceptual_distance_compares_directions_of_features(network: Path) -> None:
    distance = PerceptualDistance(network, CPU)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert distance(image, image) == 0
    decoded = (image * 0.5).requires_grad_()
    distance(decoded, image).backward()
    assert decoded.grad is not None
    assert decoded.grad.abs().sum() > 0
    assert all(torch.allclose(one.norm(dim=1), torch.ones(()), atol=1e-4) for one in distance.maps(image)[1:])


def test_a_perceptual_network_is_a_term_of_the_loss(network: Path) -> None:
    plain, inputs = (
        lesson(discriminator_weight=0.0, perceptual=path).model_loss(micro_batch_of()) for path in (None, network)
    )
    assert "perceptual" not in plain
    added = (inputs["loss"] - plain["loss"]) / (3 * SIZE * SIZE)
    torch.testing.assert_close(added, inputs["perceptual"], rtol=1e-3, atol=1e-6)


def test_what_is_no_perceptual_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no perceptual network"):
        PerceptualDistance(tmp_path / "absent.pt", CPU)
    (tmp_path / "broken.pt").write_bytes(b"not a network")
    with pytest.raises(CheckpointError, match=r"broken\.pt is no TorchScript file"):
        PerceptualDistance(tmp_path / "broken.pt", CPU)
    torch.jit.script(nn.Flatten()).save(str(tmp_path / "flat.pt"))
    with pytest.raises(CheckpointError, match="list of maps"):
        PerceptualDistance(tmp_path / "flat.pt", CPU).maps(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("setting", [{"precision": "fp16"}, {"parallelism": "shard"}, {"compile": True}])
def test_plans_that_cannot_be_followed_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"plan.{next(iter(setting))}="):
        task().prepare(Plan(folder=tmp_path, steps=1, **setting))


def test_tasks_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="random latents"):
        task(fresh=True, decoder_only=True)
    with pytest.raises(InputError, match="gives latents"):
        Reconstruction(AutoencoderKL(TINY), Halves(latents=True), task()).model_loss(micro_batch_of())


def test_bf16_trains(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lesson(), precision="bf16")
    trainer.advance()
    assert trainer.metrics.skipped == 0


def test_the_published_recipe_takes_a_perceptual_network(tmp_path: Path) -> None:
    runs = recipe_stages(Path(__file__).parents[3] / "recipes" / "kl_f8.py", tmp_path)
    for run in overridden(runs, ["task.perceptual=vgg.pt", "plan.tensorboard=true"]).values():
        assert isinstance(run.task, AutoencoderTask)
        assert run.task.perceptual == Path("vgg.pt")
        assert run.plan.tensorboard


def test_tensorboard_shows_what_the_log_says_and_no_killed_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def trainer() -> Trainer:
        return trainer_of(tmp_path, lesson(discriminator_weight=0.0), tensorboard=True)

    killed = trainer()
    killed.advance()
    killed.save()
    killed.advance()  # lost
    resumed = trainer()
    resumed.advance()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Scalars("l1")] == [1, 2]


def test_a_missing_tensorboard_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "fewstep\[train\]"'):
        trainer_of(tmp_path, lesson(), tensorboard=True)
    trainer_of(tmp_path, lesson())
