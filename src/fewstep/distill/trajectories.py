"""A teacher's sampling trajectories, stored on the disk, and a student trained to reach their ends in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.diffusion.singlestep import ddim
from fewstep.distill.teacher import Teacher
from fewstep.distill.turbo import turbo_model
from fewstep.engines.device import choose_device
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.files import atomic_write
from fewstep.train.datasets import CaptionedBatch, Prefetcher, Source, TrajectoryBatch
from fewstep.train.diffusion import NoisyLatents, conditioning_of, sample_sheet, save_result
from fewstep.train.distributed import barrier, init_ranks
from fewstep.train.forward_process import computing_in, predicted
from fewstep.train.norms import norms_in_half
from fewstep.train.plan import CPU, MicroBatch, Plan, Precision, mixed_seed
from fewstep.train.renamed import refuses_renamed
from fewstep.train.stages import StageSetup
from fewstep.train.trainer import Objective
from fewstep.weights.load import load_model

CHUNK, BATCH = 256, 32
CAPTIONS = "captions"


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """How `count` trajectories are sampled: `steps` of DDIM, evenly from the last time step, at `guidance_scale`.

    `stored_timesteps`: the student's time steps, whose latents are stored; each must be one of the trajectory's.
    `batch_size`: trajectories sampled at a time, a divisor of the 256 of a file.
    """

    count: int = 8192
    batch_size: int = BATCH
    steps: int = 8
    guidance_scale: float = 3.5
    stored_timesteps: tuple[int, ...] = (249, 499, 749, 999)

    def times(self, train_steps: int) -> list[int]:
        """The trajectory's time steps, falling. Raises `InputError` where a stored one is not among them."""
        times = [train_steps * (self.steps - i) // self.steps - 1 for i in range(self.steps)]
        if missed := [t for t in self.stored_timesteps if t not in times]:
            raise InputError(f"a trajectory of {self.steps} steps does not come by {missed}; it comes by {times}")
        return times


@dataclass(frozen=True, kw_only=True)
class TrajectoryDataset:
    """The trajectories stored in `folder`, as a source: captions, real latents, and the teacher's latents for them."""

    folder: Path

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `fewstep.train.datasets.Source`."""
        captions, tensors = _read(self.folder)
        index = micro_batch.randint("walk", len(captions))
        trajectories = TrajectoryBatch(points=tensors["points"][index].float(), end=tensors["end"][index].float())
        return CaptionedBatch(
            captions=[captions[i] for i in index.tolist()],
            latents=tensors["latents"][index].float(),
            trajectories=trajectories,
        )


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class RegressionTask:
    """Train a student to predict in one step, from each stored point of its teacher's trajectories, their ends.

    That keeps the teacher's diversity, one picture for each noise, but blurs what one step cannot predict
    (arXiv:2101.02388; a first stage for adversarial distillation). The trajectories are sampled first where they are
    not in the folder `trajectories` yet, from the captions of `data`, each rank its share.
    """

    model: str | Path
    data: Source
    trajectories: Path
    settings: TrajectorySettings
    device: str | None = None
    sample_prompts: tuple[str, ...] = ()

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        model = load_model(self.model, dtype=torch.float32, device=choose_device(self.device))
        norms_in_half(model.networks.unet, plan.precision)
        sampling = NoisyLatents(model, self.data, caption_dropout=0.0)
        empty = conditioning_of(model, sampling.engine, CaptionedBatch(captions=[""]))
        teacher = Teacher(model.networks.unet, sampling.process, empty)
        writer = TrajectoryWriter(teacher=teacher, latents=sampling, settings=self.settings, precision=plan.precision)
        source, student = (
            Prefetcher(TrajectoryDataset(folder=self.trajectories)),
            model.networks.unet.train().requires_grad_(True),
        )
        batch = NoisyLatents(model, source, caption_dropout=0.0)
        times = torch.tensor(self.settings.stored_timesteps, device=batch.engine.device)

        def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            clean, micro_batch = batch.clean(micro_batch), micro_batch.on(times.device)
            assert clean.trajectories is not None
            chosen = micro_batch.randint("point", len(times))
            t = times[chosen]
            x = clean.trajectories.points[torch.arange(len(chosen), device=times.device), chosen]
            x0 = batch.process.x0(predicted(student, x, t, clean.conditioning), x, t)
            error = (x0 - clean.trajectories.end).square().mean((1, 2, 3))
            alone = chosen == len(times) - 1
            return {"loss": error.mean(), "from_noise": (error * alone).sum() / alone.sum().clamp(min=1)}

        turbo = turbo_model(model)
        return StageSetup(
            objectives={"student": Objective(network=student, loss=loss, kind=batch.kind)},
            begin=lambda: writer.write(self.trajectories),
            finish=lambda trainer: save_result(turbo, trainer, student, "student"),
            sample=(lambda trainer: sample_sheet(turbo, self.sample_prompts)) if self.sample_prompts else None,
            waited_seconds=lambda: source.waited_seconds,
        )


def teacher_trajectory(
    teacher: Teacher, noise: Tensor, conditioning: Conditioning, settings: TrajectorySettings
) -> tuple[Tensor, Tensor]:
    """DDIM from noise (B, C, h, w): the points at the stored steps (B, K, C, h, w), and the end (B, C, h, w)."""
    process, times = teacher.process, settings.times(teacher.process.steps)
    sigmas = [process.schedule.sigmas[t] for t in times]
    t_of = dict(zip(sigmas, times, strict=True))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = torch.full((len(x),), t_of[sigma], device=x.device)
        return teacher.x0(x / sqrt(1 + sigma**2), t, conditioning, settings.guidance_scale)

    start = noise * sqrt(1 + sigmas[0] ** 2)
    steps = ddim(denoise, start, [*sigmas, 0.0], noise=lambda: torch.zeros_like(noise))
    latents = [noise, *(step.x / sqrt(1 + step.sigma**2) for step in steps)]
    points = dict(zip(times, latents, strict=False))  # the last of the latents is the end
    return torch.stack([points[t] for t in settings.stored_timesteps], dim=1), latents[-1]


@dataclass(frozen=True, kw_only=True)
class TrajectoryWriter:
    """Samples trajectories into files: each is a function of its chunk's number and its place in it."""

    teacher: Teacher
    latents: NoisyLatents
    settings: TrajectorySettings
    precision: Precision = "fp32"

    def write(self, folder: Path) -> None:
        """Write all trajectories in chunks; each rank samples its share, and files that are there stay."""
        folder.mkdir(parents=True, exist_ok=True)
        rank, ranks = init_ranks()
        for number in range(rank, -(-self.settings.count // CHUNK), ranks):
            path = folder / f"walks-{number:05d}.safetensors"
            if not path.exists():
                self._write_chunk(path, number)
        barrier()

    def _write_chunk(self, path: Path, number: int) -> None:
        captions, rows = list[str](), list[dict[str, Tensor]]()
        count = self.settings.batch_size
        for step in range(CHUNK // count):
            micro_batch = MicroBatch(seed=mixed_seed("walks", number), step=step, whole=count, first=0, count=count)
            clean, micro_batch = self.latents.clean(micro_batch), micro_batch.on(self.latents.engine.device)
            noise = micro_batch.randn("walk", *clean.x0.shape[1:])
            with computing_in(self.precision, noise.device):
                points, end = teacher_trajectory(self.teacher, noise, clean.conditioning, self.settings)
            rows.append({"latents": clean.x0, "points": points, "end": end})
            captions += self.latents.source.batch(micro_batch.on(CPU)).captions
        tensors = {name: torch.cat([row[name] for row in rows]).half().cpu().contiguous() for name in rows[0]}
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={CAPTIONS: json.dumps(captions)}))


@cache
def _read(folder: Path) -> tuple[Sequence[str], dict[str, Tensor]]:
    """Captions and tensors of all chunks."""
    captions, chunks = list[str](), list[dict[str, Tensor]]()
    for path in sorted(folder.glob("walks-*.safetensors")):
        with safe_open(path, "pt") as file:
            captions += json.loads(file.metadata()[CAPTIONS])
            chunks.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if not chunks:
        raise InputError(f"{folder} holds no trajectories; a RegressionTask writes them")
    return captions, {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
