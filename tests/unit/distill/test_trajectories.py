"""A teacher's walks: that they are its own, are kept once, and teach a student to jump."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.distill.teacher import Teacher
from fewstep.distill.trajectories import (
    RegressionTask,
    TrajectoryDataset,
    TrajectorySettings,
    TrajectoryWriter,
    teacher_trajectory,
)
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.train.datasets import Blockworld
from fewstep.train.diffusion import NoisyLatents
from fewstep.train.forward_process import ForwardProcess
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.trainer import Trainer
from fewstep.weights.load import load_model

MICRO_BATCH = MicroBatch(seed=0, step=0, whole=4, first=0, count=4)
PROMPTS = ("a red cube on top of a blue sphere", "a small green cone")
FEW = TrajectorySettings(count=300, steps=4, guidance_scale=2.0)


def test_a_walk_ends_where_the_pipeline_ends(embedded: object) -> None:
    from fewstep import Pipeline
    from fewstep.rng import SeededNoise
    from fewstep.train.datasets import CaptionedBatch
    from fewstep.train.diffusion import conditioning_of

    assert isinstance(embedded, Pipeline)
    seeds = range(len(PROMPTS))
    drawn = embedded.text_to_image(
        PROMPTS, seed=seeds, steps=4, guidance_scale=2.0, sampler="ddim", schedule="trailing", output="latent"
    )
    noisy = NoisyLatents(embedded, Blockworld(), caption_dropout=0.0)
    empty, conditioning = (
        conditioning_of(embedded, noisy.engine, CaptionedBatch(captions=said)) for said in ([""], PROMPTS)
    )
    noise = SeededNoise(tuple(seeds), (4, 16, 16))()
    points, end = teacher_trajectory(Teacher(embedded.networks.unet, noisy.process, empty), noise, conditioning, FEW)
    assert points.shape == (2, 4, 4, 16, 16)
    assert torch.equal(points[:, -1], noise)
    assert drawn.latents is not None
    # the pipeline begins with noise of the level's own size, sqrt(1 - alpha_bar) of it being the rest
    assert (end - drawn.latents).abs().max() < 0.02 * drawn.latents.abs().max()


def test_a_walk_that_does_not_come_by_a_step_of_the_student_is_refused() -> None:
    with pytest.raises(InputError, match=r"does not come by \[249, 749\]"):
        TrajectorySettings(steps=6).times(1000)


def test_walks_are_kept_whole_and_made_once(tmp_path: Path) -> None:
    model = load_model("blocks-base", dtype=torch.float32)
    batch = NoisyLatents(model, Blockworld(), caption_dropout=0.0)
    calls = []

    class Constant(Teacher):
        def x0(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, guidance: float) -> torch.Tensor:
            calls.append(guidance)
            return torch.ones_like(x)

    writer = TrajectoryWriter(teacher=Constant(model.networks.unet, ForwardProcess()), latents=batch, settings=FEW)
    writer.write(tmp_path)
    made = len(calls)
    (tmp_path / "walks-00001.safetensors").unlink()
    writer.write(tmp_path)
    assert len(calls) == made + made // 2, "the chunk that was there stayed"
    batch = TrajectoryDataset(folder=tmp_path).batch(MICRO_BATCH)
    assert batch.trajectories is not None
    assert len(batch.captions) == 4
    assert torch.equal(batch.trajectories.end, torch.ones(4, 4, 8, 8))


def test_a_student_learns_the_end_of_its_teachers_walks(tmp_path: Path) -> None:
    task = RegressionTask(
        model="blocks-base",
        data=Blockworld(),
        trajectories=tmp_path / "walks",
        settings=TrajectorySettings(count=1, steps=4),
        device="cpu",
    )
    plan = Plan(
        folder=tmp_path / "run",
        steps=12,
        batch_size=16,
        learning_rate=3e-4,
        warmup_steps=2,
        log_steps=1,
        lr_decay_fraction=0.0,
    )
    setup = task.prepare(plan)
    assert setup.begin is not None
    setup.begin()
    trainer = Trainer(setup.objectives, plan)
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_no_walks_is_an_error_that_says_who_makes_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="RegressionTask"):
        TrajectoryDataset(folder=tmp_path).batch(MICRO_BATCH)
