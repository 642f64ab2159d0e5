"""Pruned students: one residual block per level, copied from the teacher, distilled from its outputs and features."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.device import choose_device
from fewstep.files import atomic_write
from fewstep.models.config import UNetConfig
from fewstep.models.unet import UNet
from fewstep.train.datasets import Prefetcher, Source
from fewstep.train.diffusion import NoisyLatents, sample_sheet, save_result
from fewstep.train.forward_process import predicted
from fewstep.train.norms import norms_in_half
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.renamed import refuses_renamed
from fewstep.train.stages import StageSetup
from fewstep.train.trainer import Loss, Objective, Trainer
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel

BlockFeatures = dict[str, Tensor]
"""The output of each block of a UNet by the block's name, in the order of computing."""

_SECOND_ON_THE_WAY_UP = re.compile(r"up_blocks\.(\d+)\.(resnets|attentions)\.1\.")


@dataclass(frozen=True, kw_only=True)
class WeightCopyReport:
    """Which weights a student copied from its teacher; `str` of it is a report of one line.

    `copied`: student's tensor name -> the teacher's that it is a copy of. `dropped`: the teacher's tensors
    without a place in the student. The parameters are those of all these tensors together.
    """

    copied: Mapping[str, str]
    dropped: tuple[str, ...]
    copied_parameters: int
    dropped_parameters: int

    def __str__(self) -> str:
        layers = dict.fromkeys(".".join(name.split(".")[:4]) for name in self.dropped)
        dropped = f"{len(self.dropped)} ({self.dropped_parameters:,}) dropped: {', '.join(layers)}"
        return (
            f"{len(self.copied)} tensors ({self.copied_parameters:,} parameters) copied, "
            f"{dropped if layers else 'none dropped'}"
        )


def pruned_config(config: UNetConfig) -> UNetConfig:
    """The shape with one residual block (and transformer) per level down, two up: small-sd's from sd-v1-4's."""
    return replace(config, stages=tuple(replace(stage, resnets=1) for stage in config.stages))


def teacher_tensor(name: str, config: UNetConfig) -> str:
    """The tensor of a teacher of shape `config` that the student's tensor `name` starts from.

    Each has the teacher's name but one layer per level. On the way up the student's second residual block reads the
    skip connection that leaves the level above, whose channels only the teacher's last block fits; its transformer
    goes with it (arXiv:2305.15798 does the same).
    """
    second = _SECOND_ON_THE_WAY_UP.match(name)
    if second is None:
        return name
    block, kind = second.groups()
    last = config.stages[-1 - int(block)].resnets  # a level has one residual block more on the way up than down
    return f"up_blocks.{block}.{kind}.{last}.{name[second.end() :]}"


def pruned_student(teacher: UNet) -> tuple[UNet, WeightCopyReport]:
    """A UNet of the small shape, every tensor copied from its place in `teacher`, and the report of that.

    It trains, and has the teacher's device and number format: train it in float32 (`student.float()`). The teacher
    may be any UNet of the family, and shares no memory with the student.
    """
    teacher_tensors = teacher.state_dict()
    with torch.device("meta"):
        student = UNet(pruned_config(teacher.config))
    student_tensors = student.state_dict()
    copied = {name: teacher_tensor(name, teacher.config) for name in student_tensors}
    for name, source in copied.items():
        shapes = tuple(student_tensors[name].shape), tuple(teacher_tensors[source].shape)
        assert shapes[0] == shapes[1], f"{name} is {shapes[0]}, but the teacher's {source} {shapes[1]}"
    student.load_state_dict({name: teacher_tensors[source].clone() for name, source in copied.items()}, assign=True)
    used = set(copied.values())
    dropped = tuple(name for name in teacher_tensors if name not in used)
    return student, WeightCopyReport(
        copied=copied,
        dropped=dropped,
        copied_parameters=sum(tensor.numel() for tensor in student_tensors.values()),
        dropped_parameters=sum(teacher_tensors[name].numel() for name in dropped),
    )


@contextmanager
def block_features(unet: UNet) -> Iterator[BlockFeatures]:
    """The outputs of the down, mid and up blocks of `unet`, anew in each forward pass until the context ends.

    Blocks are found in the module itself: give the bare UNet and call it, or the wrapper (DDP) it lies in. A compiled
    model does not see hooks that come after its compilation: enter before its first pass, and stay.
    """
    features: BlockFeatures = {}
    handles = [block.register_forward_hook(partial(_record, features, name)) for name, block in _blocks(unet).items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def distillation_loss(
    student_out: Tensor,
    teacher_out: Tensor,
    student_features: Mapping[str, Tensor],
    teacher_features: Mapping[str, Tensor],
    *,
    output_weight: float = 1.0,
    feature_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The terms of arXiv:2305.15798 that need a teacher, as float32 scalars.

    "output": mean squared error of the outputs. "features": sum over the blocks of the mean squared error of their
    outputs; the published code leaves the middle block out, so take "mid_block" from both sides to repeat it. "loss":
    their weighted sum, to which the training's own loss is added (weight 1 in the paper). Gradients reach the student
    alone.
    """
    names = student_features.keys()
    assert names == teacher_features.keys(), f"blocks of the student {[*names]}, of the teacher {[*teacher_features]}"
    assert names or not feature_weight, "no features were recorded; run both networks inside block_features"
    output = _squared_error(student_out, teacher_out)
    errors = [_squared_error(student_features[name], teacher_features[name]) for name in names]
    features = torch.stack(errors).sum() if errors else torch.zeros_like(output)
    return {"loss": output_weight * output + feature_weight * features, "output": output, "features": features}


def _blocks(unet: UNet) -> dict[str, nn.Module]:
    downs = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    ups = {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    return {**downs, "mid_block": unet.mid_block, **ups}


def _record(features: BlockFeatures, name: str, block: nn.Module, inputs: object, output: Tensor) -> None:
    del block, inputs
    features[name] = output


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    assert student.shape == teacher.shape, f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    return F.mse_loss(student.float(), teacher.detach().float())


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class PrunedStudentTask:
    """Train a pruned student of the teacher `model` on the teacher's outputs and on the data.

    `student`: a model to go on from; without one it begins with the teacher's layers. `denoising_weight`:
    of the loss on the data; `output_weight` and `feature_weight`: of the squared errors to the teacher's outputs and
    block features (arXiv:2305.15798 has 1 for all three).
    """

    model: str | Path
    data: Source
    student: Path | None = None
    caption_dropout: float = 0.1
    denoising_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    device: str | None = None
    sample_prompts: tuple[str, ...] = ()

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        device = choose_device(self.device)
        model = load_model(self.model, dtype=torch.float32, device=device)
        if self.student is None:
            student, report = pruned_student(model.networks.unet)
        else:
            report = None
            student = load_model(self.student, dtype=torch.float32, device=device).networks.unet
        student.train().requires_grad_(True)
        norms_in_half(model.networks.unet, plan.precision)
        source, pruned = Prefetcher(self.data), model.with_unet(student)
        noisy = NoisyLatents(model, source, caption_dropout=self.caption_dropout)
        return StageSetup(
            objectives={
                "model": Objective(
                    network=student, loss=self._loss(student, model.networks.unet, noisy), kind=noisy.kind
                )
            },
            finish=lambda trainer: self._save(pruned, trainer, student, report),
            sample=(lambda trainer: sample_sheet(pruned, self.sample_prompts)) if self.sample_prompts else None,
            waited_seconds=lambda: source.waited_seconds,
        )

    def _save(self, pruned: LoadedModel, trainer: Trainer, student: UNet, report: WeightCopyReport | None) -> None:
        """Write the student, and in `inherited.txt` which weights it copied from the teacher."""
        save_result(pruned, trainer, student)
        if report is not None and trainer.rank == 0:
            with atomic_write(trainer.plan.folder / "inherited.txt") as file:
                file.write(f"{report}\n".encode())

    def _loss(self, student: UNet, teacher: UNet, noisy: NoisyLatents) -> Loss:
        def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
            x, t, conditioning, target = noisy(micro_batch)
            with torch.no_grad(), block_features(teacher) as teacher_features:
                teacher_out = predicted(teacher, x, t, conditioning)
            with block_features(student) as features:
                student_out = predicted(student, x, t, conditioning)
            terms = distillation_loss(
                student_out,
                teacher_out,
                features,
                teacher_features,
                output_weight=self.output_weight,
                feature_weight=self.feature_weight,
            )
            own = F.mse_loss(student_out.float(), target)
            return terms | {"loss": terms["loss"] + self.denoising_weight * own, "own": own}

        return loss
