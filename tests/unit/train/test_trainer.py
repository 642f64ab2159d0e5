"""The training pieces: losses, moving average, checkpoints, exact resume, folding."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.denoiser import training_target, x0_from_training_output
from fewstep.engines.engine import Conditioning
from fewstep.errors import CheckpointError, InputError, NotFiniteError
from fewstep.models.autoencoder import AutoencoderKL, Posterior
from fewstep.models.config import AutoencoderConfig, Stage, UNetConfig
from fewstep.models.unet import UNet
from fewstep.nn.attention import attention
from fewstep.train.activation_checkpointing import checkpoint_blocks
from fewstep.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from fewstep.train.distributed import shutdown_ranks
from fewstep.train.done import is_done
from fewstep.train.ema import Ema
from fewstep.train.forward_process import ForwardProcess, predicted
from fewstep.train.losses import (
    AutoencoderLoss,
    min_snr_weight,
    stratified_timesteps,
)
from fewstep.train.normalize_latents import normalize_latents
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.trainer import Loss, Objective, Trainer

TINY_VAE = AutoencoderConfig(channels=(8, 8), resnets=1, groups=4, scaling_factor=1.0)
TINY_UNET = UNetConfig(stages=(Stage(channels=16, resnets=1, depth=1, heads=2),), context=8, groups=4)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def line_loss(model: nn.Module) -> Loss:
    """A regression on fresh random numbers, so that going on must also go on with them."""

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        x = micro_batch.randn("x", 3)
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return loss


def line_trainer(folder: Path, **options: object) -> Trainer:
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    chosen = {
        "folder": folder,
        "learning_rate": 0.1,
        "steps": 40,
        "warmup_steps": 2,
        "log_steps": 5,
        "batch_size": 8,
    } | options
    plan = Plan(**chosen)  # type: ignore[arg-type]
    return Trainer({"model": Objective(network=model, loss=line_loss(model))}, plan)


def advanced(trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        trainer.advance()
    return trainer


def weights(trainer: Trainer) -> list[Tensor]:
    state = trainer.states["model"]
    return [*state.network.state_dict().values(), *state.ema.averages]


def spoilt(trainer: Trainer, factor: float) -> Trainer:
    state = trainer.states["model"]
    inner = state.objective.loss
    object.__setattr__(state.objective, "loss", lambda micro_batch: {"loss": inner(micro_batch)["loss"] * factor})
    return trainer


def test_run_falls_and_logs(tmp_path: Path) -> None:
    trainer = line_trainer(tmp_path, steps=100, ema_decay=0.9)
    trainer.run()
    averaged = trainer.averaged("model")
    x = torch.randn(64, 3)
    assert (x @ averaged["weight"].T + averaged["bias"] - x.sum(1, keepdim=True)).square().mean() < 1e-2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 20
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100.pt"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_equal(tmp_path: Path, precision: str) -> None:
    whole = advanced(line_trainer(tmp_path / "whole", precision=precision), 20)
    advanced(line_trainer(tmp_path / "parts", precision=precision), 10).save()
    resumed = line_trainer(tmp_path / "parts", precision=precision)
    assert resumed.step == 10
    advanced(resumed, 10)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = advanced(line_trainer(tmp_path / "whole"), 30)
    process = torch.multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = line_trainer(tmp_path / "killed")
    assert resumed.step == 17
    advanced(resumed, 30 - resumed.step)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def train_until_killed(folder: Path) -> None:
    trainer = line_trainer(folder)
    for step in range(19):
        trainer.advance()
        if step % 4 == 0:
            trainer.save()
    os.kill(os.getpid(), signal.SIGKILL)


def test_accumulated_parts_train_as_one_batch(tmp_path: Path) -> None:
    one = advanced(line_trainer(tmp_path / "one"), 10)
    four = advanced(line_trainer(tmp_path / "four", gradient_accumulation=4), 10)
    for a, b in zip(weights(one), weights(four), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nearest that can are 6 and 9"):
        line_trainer(tmp_path, gradient_accumulation=3)


def test_sigterm_saves_and_a_rerun_goes_on(tmp_path: Path) -> None:
    trainer = line_trainer(tmp_path)
    state = trainer.states["model"]
    inner = state.objective.loss

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        if micro_batch.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return dict(inner(micro_batch))

    object.__setattr__(state.objective, "loss", loss)
    trainer.run()
    assert trainer.step == 11
    again = line_trainer(tmp_path)
    assert again.step == 11
    again.run()
    assert again.step == 40


def test_single_bad_steps_are_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    trainer = spoilt(line_trainer(tmp_path), math.nan)
    before = [value.clone() for value in weights(trainer)]
    trainer.advance()
    assert trainer.metrics.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    with pytest.raises(
        NotFiniteError, match=r"step 5: the loss is nan.*lower plan\.learning_rate .*no checkpoint was written"
    ):
        trainer.run()
    assert not list(tmp_path.glob("*.pt"))


def test_an_fp16_loss_is_scaled_down_where_its_gradients_overflow(tmp_path: Path) -> None:
    trainer = spoilt(line_trainer(tmp_path, precision="fp16", steps=60), 300.0)
    first = trainer.states["model"].scale
    advanced(trainer, 15)
    assert 1 < trainer.states["model"].scale < first
    assert trainer.states["model"].ema.updates > 0


def test_only_one_network_learns_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        return {"loss": second(first(micro_batch.randn("x", 3))).square().mean()}

    objectives = {
        "first": Objective(network=first, loss=loss),
        "second": Objective(network=second, loss=loss, lr_multiplier=0.0),
    }
    trainer = Trainer(
        objectives,
        Plan(folder=tmp_path, learning_rate=0.1, steps=9, warmup_steps=0, batch_size=4, log_steps=1, weight_decay=0.0),
    )
    before = second.weight.clone()
    trainer.advance()
    assert torch.equal(second.weight, before)
    assert {"first.loss", "second.loss"} <= json.loads((tmp_path / "log.jsonl").read_text()).keys()


def test_random_numbers_are_those_of_the_batch_however_it_is_shared_out() -> None:
    plan = Plan(folder=Path(), steps=1, batch_size=12)
    whole = plan.micro_batches(3, 0, 1)[0].randn("noise", 2)
    shared = [
        micro_batch.randn("noise", 2)
        for rank in range(3)
        for micro_batch in replace(plan, gradient_accumulation=2).micro_batches(3, rank, 3)
    ]
    assert torch.equal(whole, torch.cat(shared))
    assert not torch.equal(whole, plan.micro_batches(3, 0, 1)[0].randn("other", 2))
    assert not torch.equal(whole, plan.micro_batches(4, 0, 1)[0].randn("noise", 2))


def test_checkpointed_blocks_compute_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(TINY_UNET)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 500.0]), torch.randn(2, 3, 8)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(x, t, context).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        names = list(model.state_dict())
        checkpoint_blocks(model)
    assert list(model.state_dict()) == names
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_in_bfloat16_is_attention() -> None:
    q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
    low = [value.bfloat16().requires_grad_() for value in (q, k, v)]
    mixed = attention(*low)
    mixed.float().square().sum().backward()
    high = [value.requires_grad_() for value in (q, k, v)]
    F.scaled_dot_product_attention(*high).square().sum().backward()
    assert torch.allclose(mixed.float(), F.scaled_dot_product_attention(*high), atol=0.03)
    for one, other in zip(low, high, strict=True):
        assert torch.allclose(one.grad.float(), other.grad, atol=0.1)


def test_a_plan_without_an_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps or seconds"):
        Plan(folder=tmp_path, learning_rate=0.1)


def test_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    plan = Plan(
        folder=tmp_path, learning_rate=1.0, steps=100, warmup_steps=10, lr_decay_fraction=0.2, min_lr_ratio=0.01
    )
    rates = [plan.learning_rate_at(step, plan.progress(step, 0.0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[90] == pytest.approx(0.505)
    assert rates[100] == pytest.approx(0.01)
    assert sorted(rates[80:], reverse=True) == rates[80:]


def test_a_run_ends_by_whichever_comes_first(tmp_path: Path) -> None:
    plan = Plan(folder=tmp_path, learning_rate=1.0, steps=100, seconds=10.0)
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
    ema.update()
    assert ema.averages[0].item() == pytest.approx(1 - 2 / 11)
    for _ in range(20):
        ema.update()
    before = ema.averages[0].item()
    nn.init.zeros_(model.weight)
    ema.update()
    assert ema.averages[0].item() == pytest.approx(before / 2)
    with ema.in_place():
        assert model.weight.item() == pytest.approx(before / 2)
    assert model.weight.item() == 0


def test_velocity_target_and_x0_agree() -> None:
    x0, eps, alpha_bar = torch.randn(4), torch.randn(4), torch.tensor([0.9, 0.5, 0.1, 0.01])
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    v = training_target(x0, eps, alpha_bar, "v_prediction")
    torch.testing.assert_close(alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v, x0)
    for prediction in ("epsilon", "v_prediction", "sample"):
        output = training_target(x0, eps, alpha_bar, prediction)  # type: ignore[arg-type]
        torch.testing.assert_close(x0_from_training_output(output, x, alpha_bar, prediction), x0)  # type: ignore[arg-type]
    assert training_target(x0, eps, alpha_bar, "epsilon") is eps
    assert training_target(x0, eps, alpha_bar, "sample") is x0


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
    posterior = Posterior.of(moments)
    latents = posterior.sample(torch.randn_like(posterior.mean))
    assert latents.mean() == pytest.approx(2.0, abs=0.02)
    assert latents.std() == pytest.approx(0.5, abs=0.02)


def test_folding_is_exact() -> None:
    model = AutoencoderKL(TINY_VAE).double().eval()
    image = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    mean, log_variance = model.encode(image).chunk(2, 1)
    pictures = model.decode(mean)
    shift, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    normalize_latents(model, shift.detach(), spread.detach())
    folded, folded_log_variance = model.encode(image).chunk(2, 1)
    torch.testing.assert_close(folded.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(folded.std((0, 2, 3)), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(folded_log_variance, log_variance - 2 * spread.log()[:, None, None])
    torch.testing.assert_close(model.decode(folded), pictures)


def test_a_tiny_unet_learns_its_velocity(tmp_path: Path) -> None:
    model, process = UNet(TINY_UNET), ForwardProcess(prediction="v_prediction")
    x0, context = torch.randn(16, 4, 4, 4), torch.randn(16, 3, 8)
    t = torch.full((16,), 400)

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        eps = micro_batch.randn("noise", 4, 4, 4)
        output = predicted(model, process.noised(x0, eps, t), t, Conditioning(context=context))
        torch.testing.assert_close(process.x0(process.target(x0, eps, t), process.noised(x0, eps, t), t), x0)
        return {"loss": (output - process.target(x0, eps, t)).square().mean()}

    micro_batch = MicroBatch(seed=0, step=0, whole=16, first=0, count=16)
    before = loss(micro_batch)["loss"].item()
    objectives = {"model": Objective(network=model, loss=loss)}
    Trainer(objectives, Plan(folder=tmp_path, learning_rate=5e-3, steps=60, warmup_steps=5, batch_size=16)).run()
    assert loss(micro_batch)["loss"].item() < 0.6 * before


def train_rank(rank: int, ranks: int, port: int, folder: Path, sharing: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, process = UNet(TINY_UNET), ForwardProcess()

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        x0, eps, context = (
            micro_batch.randn("x0", 4, 4, 4),
            micro_batch.randn("noise", 4, 4, 4),
            micro_batch.randn("words", 3, 8),
        )
        t = micro_batch.rows("t", lambda count, generator: stratified_timesteps(count, 1000, generator))
        output = predicted(model, process.noised(x0, eps, t), t, Conditioning(context=context))
        return {"loss": (output - process.target(x0, eps, t)).square().mean()}

    plan = Plan(folder=folder, learning_rate=1e-3, steps=8, warmup_steps=1, batch_size=8, parallelism=sharing)  # type: ignore[arg-type]
    trainer = Trainer({"model": Objective(network=model, loss=loss)}, plan)
    trainer.run()
    averaged = trainer.averaged("model")
    if rank == 0:
        torch.save(averaged, folder / "averaged.pt")
    shutdown_ranks()


@pytest.mark.parametrize("sharing", ["replicate", "shard"])
def test_two_ranks_train_as_one_with_the_same_batch(tmp_path: Path, sharing: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_rank, args=(2, port, tmp_path / "two", sharing), nprocs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        train_rank(0, 1, port, tmp_path / "one", sharing)
    for name in ("averaged.pt", "step-00000008.pt"):
        two, one = (torch.load(tmp_path / ranks / name, weights_only=True) for ranks in ("two", "one"))
        model = [saved if name == "averaged.pt" else saved["model"]["model"] for saved in (two, one)]
        torch.testing.assert_close(model[0], model[1], rtol=1e-3, atol=1e-4)
    assert all(isinstance(value, Tensor) for value in one["model"]["ema"].values())


def test_a_stage_that_was_done_before_its_length_was_noted_stays_done(tmp_path: Path) -> None:
    (tmp_path / "done").touch()
    save_checkpoint(tmp_path, 40, {"step": 40})
    timed = Plan(folder=tmp_path, seconds=60.0)
    assert is_done(timed, {"plan.steps": "None", "plan.seconds": "60.0"})
    assert is_done(Plan(folder=tmp_path, steps=40), {"plan.steps": "40"})
    assert not is_done(Plan(folder=tmp_path, steps=80), {"plan.steps": "80"}), "more steps go on"
