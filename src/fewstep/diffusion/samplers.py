"""The samplers by name, and what a caller has to know about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, plms, unipc
from fewstep.diffusion.schedule import TimestepConvention
from fewstep.diffusion.singlestep import ddim, ddpm, dpmpp_sde, euler, euler_ancestral, heun, lcm
from fewstep.diffusion.step import Noise, Step
from fewstep.errors import InputError, unknown

Sampler = Callable[..., Iterator[Step]]
"""`sampler(denoise, x, sigmas, *, noise, eta)`, without those of the last two that it does not take."""


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """A sampler, and how diffusers would start and end it.

    - `evaluations`: model calls a step (a step to 0 takes one; `plms` makes one more in its first step);
    - `spacing`: its schedule where neither the user nor the checkpoint names one, as in diffusers' class of it;
    - `curves`: whether it heeds a checkpoint's `use_karras_sigmas` and `use_exponential_sigmas`;
    - `convention`: how it reads the schedules `leading` and `linspace`;
    - `may_end_above_zero`: whether it heeds a checkpoint's `set_alpha_to_one: false`, by levels that end
      at the schedule's lowest; all others end at 0;
    - `consistency`: whether it wants its denoiser wrapped in `denoiser.consistency`.
    """

    function: Sampler
    takes_noise: bool = False
    takes_eta: bool = False
    evaluations: int = 1
    spacing: str = "linspace"
    curves: bool = False
    convention: TimestepConvention = "ddim"
    may_end_above_zero: bool = False
    consistency: bool = False

    def __call__(
        self, denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise, eta: float | None = None
    ) -> Iterator[Step]:
        """The steps of a run; `noise` and `eta` reach only a sampler that takes them.

        Raises InputError for an `eta` outside 0 ... 1, or given to a sampler without one.
        """
        options: dict[str, Any] = {"noise": noise} if self.takes_noise else {}
        if eta is None:
            return self.function(denoise, x, sigmas, **options)
        if not self.takes_eta:
            others = ", ".join(name for name, spec in SAMPLERS.items() if spec.takes_eta)
            raise InputError(f"eta {eta} means nothing to this sampler; those that take it are {others}")
        if not 0 <= eta <= 1:
            raise InputError(f"eta {eta} is not in 0 ... 1; the nearest is {min(max(eta, 0.0), 1.0)}")
        return self.function(denoise, x, sigmas, eta=eta, **options)

    def initial_scale(self, schedule_name: str, sigma: float) -> float:
        """What to multiply unit noise by, to start at level `sigma`: diffusers' `init_noise_sigma`.

        The samplers born in sigma coordinates take levels that start at the very top (`linspace`, `trailing`,
        `karras`, `exponential`) for pure noise of that size; elsewhere x also holds x0, of variance about 1.
        """
        if self.convention == "euler" and schedule_name in ("linspace", "trailing", "karras", "exponential"):
            return sigma
        return sqrt(1 + sigma**2)


_SDE: dict[str, Any] = {"takes_noise": True, "takes_eta": True}
_EULER: dict[str, Any] = {"convention": "euler", "curves": True}
_MULTISTEP: dict[str, Any] = {"convention": "multistep", "curves": True}
_LEADING: dict[str, Any] = {"spacing": "leading"}

SAMPLERS: Mapping[str, SamplerSpec] = MappingProxyType(
    {
        "euler": SamplerSpec(function=euler, **_EULER),
        "euler_ancestral": SamplerSpec(function=euler_ancestral, convention="euler", **_SDE),
        "heun": SamplerSpec(function=heun, evaluations=2, **_EULER),
        "ddim": SamplerSpec(function=ddim, may_end_above_zero=True, **_SDE, **_LEADING),
        "plms": SamplerSpec(function=plms, may_end_above_zero=True, **_LEADING),
        "dpmpp_2m": SamplerSpec(function=dpmpp_2m, **_MULTISTEP),
        "dpmpp_2m_sde": SamplerSpec(function=dpmpp_2m_sde, **_MULTISTEP, **_SDE),
        "dpmpp_sde": SamplerSpec(function=dpmpp_sde, evaluations=2, **_EULER, **_SDE),
        "dpmpp_3m_sde": SamplerSpec(function=dpmpp_3m_sde, **_MULTISTEP, **_SDE),
        "unipc": SamplerSpec(function=unipc, **_MULTISTEP),
        "lcm": SamplerSpec(function=lcm, convention="lcm", takes_noise=True, consistency=True, **_LEADING),
        "ddpm": SamplerSpec(function=ddpm, takes_noise=True, **_LEADING),
    }
)
"""Every sampler by its name."""


def sampler(name: str) -> SamplerSpec:
    """The sampler of this name. Raises InputError, with the nearest name, for an unknown one."""
    if name not in SAMPLERS:
        raise InputError(unknown("sampler", name, SAMPLERS))
    return SAMPLERS[name]
