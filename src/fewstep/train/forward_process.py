"""The forward (noising) process that UNets are trained on, and a UNet's call with its conditioning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Prediction, training_target, x0_from_training_output
from fewstep.diffusion.schedule import NoiseSchedule, noise_schedule
from fewstep.engines.engine import Conditioning
from fewstep.models.unet import UNet
from fewstep.train.plan import Precision


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which networks on `device` compute in `precision`; their weights stay as they are."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, kind, enabled=kind != torch.float32)


def predicted(unet: UNet, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The output of `unet` for latents x (B, 4, h, w) at steps t (B,)."""
    if conditioning.channels is not None:
        x = torch.cat([x, conditioning.channels], dim=1)
    output: Tensor = unet(x, t.float(), conditioning.context, conditioning.pooled, conditioning.sizes)
    return output


def conditioning_rows(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The conditioning of rows (B,) int64 of another: to shuffle them, or to repeat one."""
    values = {name: value[rows] for name, value in vars(conditioning).items() if value is not None}
    return replace(conditioning, **values)


@dataclass(frozen=True, kw_only=True)
class ForwardProcess:
    """`x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps` at steps t (B,) int64, and its parameterisation."""

    prediction: Prediction = "epsilon"
    schedule: NoiseSchedule = field(default_factory=noise_schedule)

    @property
    def steps(self) -> int:
        """How many steps there are: t is below it."""
        return len(self.schedule.alpha_bar)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """(B, 1, 1, 1)."""
        return _table(self.schedule, t.device)[t][:, None, None, None]

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The latents at t."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The output that the UNet is trained towards."""
        return training_target(x0, eps, self.alpha_bar(t), self.prediction)

    def x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean latents that an output stands for."""
        return x0_from_training_output(output, x, self.alpha_bar(t), self.prediction)


@lru_cache(maxsize=16)
def _table(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """Every step's alpha_bar on a device: copied there once, since a step that is replayed cannot wait for it."""
    return torch.as_tensor(schedule.alpha_bar, dtype=torch.float32, device=device)
