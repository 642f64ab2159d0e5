"""The training pieces: losses, moving average, checkpoints, exact resume, folding."""

from __future__ import annotations

import math
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError, InputError, NotFiniteError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, UNetConfig
from fewstep.models.unet import UNet
from fewstep.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fewstep.train.ema import Ema
from fewstep.train.fold import fold_statistics
from fewstep.train.loop import Loss, Plan, Trainer
from fewstep.train.losses import (
    AutoencoderLoss,
    min_snr_weight,
    sampled_latents,
    stratified_timesteps,
    target,
)
from fewstep.train.parallel import leave_ranks

TINY_VAE = AutoencoderConfig(channels=(8, 8), resnets=1, groups=4, scaling_factor=1.0)
TINY_UNET = UNetConfig(stages=(Stage(channels=16, resnets=1, depth=1, heads=2),), context=8, groups=4)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def line_loss(model: nn.Linear) -> Loss:
    """A regression on fresh random numbers, so that resuming must also restore the random state."""

    def loss(step: int) -> dict[str, Tensor]:
        del step
        x = torch.randn(8, 3)
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return loss


def line_trainer(folder: Path, steps: int, **options: object) -> Trainer[nn.Linear]:
    torch.manual_seed(1)
    plan = Plan(folder=folder, rate=0.1, steps=40, warmup=2, log_steps=5, **options)  # type: ignore[arg-type]
    trainer = Trainer(nn.Linear(3, 1), plan)
    start = trainer.step
    while trainer.step < start + steps:
        trainer._advance(line_loss(trainer.model))
    return trainer


def test_run_falls_and_logs(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path, rate=0.1, steps=100, warmup=2, ema=0.9, log_steps=5)
    trainer = Trainer(nn.Linear(3, 1), plan)
    model = trainer.run(line_loss(trainer.model))
    x = torch.randn(64, 3)
    assert (model(x) - x.sum(1, keepdim=True)).square().mean() < 1e-2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 20
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100.pt"]


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = line_trainer(tmp_path / "whole", 20)
    first = line_trainer(tmp_path / "parts", 10)
    first.save()
    second = line_trainer(tmp_path / "parts", 10)
    assert second.step == 20
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
        assert torch.equal(whole.ema.model.state_dict()[name], second.ema.model.state_dict()[name])


def test_sigterm_saves_and_a_rerun_goes_on(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path, rate=0.1, steps=30)
    trainer = Trainer(nn.Linear(3, 1), plan)
    inner = line_loss(trainer.model)

    def loss(step: int) -> dict[str, Tensor]:
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return dict(inner(step))

    trainer.run(loss)
    assert trainer.step == 11
    again = Trainer(nn.Linear(3, 1), plan)
    assert again.step == 11
    again.run(line_loss(again.model))
    assert again.step == 30


def test_single_bad_steps_are_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    trainer = Trainer(nn.Linear(3, 1), Plan(folder=tmp_path, rate=0.1, steps=100))
    inner = line_loss(trainer.model)
    trainer._advance(lambda step: {"loss": inner(step)["loss"] * math.nan})
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.ema.updates == 0
    with pytest.raises(NotFiniteError, match="20 steps"):
        trainer.run(lambda step: {"loss": inner(step)["loss"] * math.inf})


def test_a_plan_without_an_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps or seconds"):
        Plan(folder=tmp_path, rate=0.1)


def test_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path, rate=1.0, steps=100, warmup=10, decay=0.2, floor=0.01)
    rates = [plan.rate_at(step, plan.progress(step, 0.0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[90] == pytest.approx(0.505)
    assert rates[100] == pytest.approx(0.01)
    assert sorted(rates[80:], reverse=True) == rates[80:]


def test_a_run_ends_by_whichever_comes_first(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path, rate=1.0, steps=100, seconds=10.0)
    assert plan.progress(50, 1.0) == 0.5
    assert plan.progress(1, 9.0) == 0.9


def test_checkpoints_keep_the_last_and_survive_a_broken_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000003.pt"]

    def broken(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 4, {"step": 4}, keep=2)
    assert load_checkpoint(tmp_path) == {"step": 3}


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "step-00000001.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt cannot be read"):
        load_checkpoint(tmp_path)


def test_ema_warms_up_then_decays() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, 0.5)
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.model.weight.item() == pytest.approx(1 - 2 / 11)
    for _ in range(20):
        ema.update(model)
    before = ema.model.weight.item()
    nn.init.zeros_(model.weight)
    ema.update(model)
    assert ema.model.weight.item() == pytest.approx(before / 2)
    assert not ema.model.weight.requires_grad


def test_velocity_target_and_x0_agree() -> None:
    x0, eps, alpha_bar = torch.randn(4), torch.randn(4), torch.tensor([0.9, 0.5, 0.1, 0.01])
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    v = target("v_prediction", x0, eps, alpha_bar)
    torch.testing.assert_close(alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v, x0)
    assert target("epsilon", x0, eps, alpha_bar) is eps
    assert target("sample", x0, eps, alpha_bar) is x0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_counts_every_form_the_same_in_x0(prediction: str) -> None:
    snr = torch.tensor([0.1, 1.0, 3.0, 50.0])
    alpha_bar = snr / (1 + snr)
    x0_error = {"epsilon": 1 / snr, "v_prediction": 1 / (1 + snr), "sample": torch.ones(4)}[prediction]
    weight = min_snr_weight(prediction, alpha_bar, 5.0)  # type: ignore[arg-type]
    torch.testing.assert_close(weight, snr.clamp(max=5) * x0_error)
    floored = min_snr_weight(prediction, alpha_bar, 5.0, floor=1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(floored, snr.clamp(1, 5) * x0_error)


def test_stratified_timesteps_cover_the_range() -> None:
    t = stratified_timesteps(10, 1000)
    assert sorted((t // 100).tolist()) == list(range(10))
    assert t.dtype == torch.int64


def test_autoencoder_loss_is_zero_for_a_perfect_picture_and_weighs_colour() -> None:
    weigh = AutoencoderLoss()
    grey = torch.zeros(1, 3, 8, 8)
    red = grey.clone()
    red[:, 0] = 1
    assert weigh.picture(red, red) == 0
    assert weigh.picture(red + 0.1, red) == pytest.approx(4 * float(weigh.picture(grey + 0.1, grey)), rel=1e-4)
    assert weigh.divergence(torch.zeros(1, 8, 2, 2)) == 0


def test_sampled_latents_have_the_moments() -> None:
    moments = torch.cat([torch.full((1, 4, 64, 64), 2.0), torch.full((1, 4, 64, 64), 2 * math.log(0.5))], 1)
    latents = sampled_latents(moments)
    assert latents.mean() == pytest.approx(2.0, abs=0.02)
    assert latents.std() == pytest.approx(0.5, abs=0.02)


def test_folding_is_exact() -> None:
    model = AutoencoderKL(TINY_VAE).double().eval()
    image = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    mean, log_variance = model.encode(image).chunk(2, 1)
    pictures = model.decode(mean)
    shift, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    fold_statistics(model, shift.detach(), spread.detach())
    folded, folded_log_variance = model.encode(image).chunk(2, 1)
    torch.testing.assert_close(folded.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(folded.std((0, 2, 3)), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(folded_log_variance, log_variance - 2 * spread.log()[:, None, None])
    torch.testing.assert_close(model.decode(folded), pictures)


def test_a_tiny_unet_learns_its_velocity(tmp_path: Path) -> None:
    model = UNet(TINY_UNET)
    x0, context = torch.randn(16, 4, 4, 4), torch.randn(16, 3, 8)
    alpha_bar = torch.tensor(0.5)

    def loss(step: int) -> dict[str, Tensor]:
        del step
        eps = torch.randn_like(x0)
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        output = model(x, torch.full((16,), 500.0), context)
        return {"loss": (output - target("v_prediction", x0, eps, alpha_bar)).square().mean()}

    before = loss(0)["loss"].item()
    Trainer(model, Plan(folder=tmp_path, rate=5e-3, steps=60, warmup=5)).run(loss)
    assert loss(0)["loss"].item() < 0.6 * before


def train_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.arange(12.0).reshape(4, 3).sin()
    part = x[rank::ranks]
    trainer = Trainer(model, Plan(folder=folder, rate=0.1, steps=8, warmup=1))
    trainer.run(lambda step: {"loss": (model(part) - part.sum(1, keepdim=True)).square().mean()})
    torch.save(model.state_dict(), folder / f"rank-{rank}.pt")
    leave_ranks()


def test_two_ranks_train_as_one_with_both_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_rank, args=(2, port, tmp_path / "two"), nprocs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        train_rank(0, 1, port, tmp_path / "one")
    weights = [torch.load(tmp_path / name) for name in ("two/rank-0.pt", "two/rank-1.pt", "one/rank-0.pt")]
    assert torch.equal(weights[0]["weight"], weights[1]["weight"])
    torch.testing.assert_close(weights[0], weights[2])
