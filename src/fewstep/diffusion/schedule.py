"""Noise levels: what a model's time steps mean, and which levels a run visits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from math import cos, log, pi, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fewstep.errors import InputError, unknown

Floats = npt.NDArray[np.float64]
BetaKind = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
Final = Literal["zero", "sigma_min"]
TimestepConvention = Literal["ddim", "euler", "multistep", "lcm"]
"""Which diffusers scheduler family's rounding `leading` and `linspace` follow."""

SMALLEST_ALPHA_BAR = 2.0**-24
"""What zero-terminal-SNR schedules end at, so that their highest sigma is 4096 and not infinite."""


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise levels a model was trained at, one for each of its time steps 0, 1, ..., T - 1.

    `alpha_bar` falls from nearly 1 (clean) to nearly 0 (noise), as in arXiv:2006.11239; the network sees
    `sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * eps`, and `sigma` is the ratio of the two factors.
    """

    alpha_bar: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """`sqrt((1 - alpha_bar) / alpha_bar)` of every time step; rises with t."""
        return tuple(sqrt((1 - a) / a) for a in self.alpha_bar)

    @cached_property
    def _log_sigmas(self) -> Floats:
        return np.array([log(sigma) for sigma in self.sigmas])

    def t_to_sigma(self, t: float) -> float:
        """The level of time step `t`: exact for whole t, log-linear in between, clamped to 0 ... T - 1."""
        low = min(max(int(t), 0), len(self) - 2)
        weight = min(max(t - low, 0.0), 1.0)
        return float(self.sigmas[low] ** (1 - weight) * self.sigmas[low + 1] ** weight)

    def sigma_to_t(self, sigma: float) -> float:
        """The time step, perhaps fractional, of level `sigma`: the inverse of `t_to_sigma`."""
        return float(np.interp(log(sigma), self._log_sigmas, np.arange(len(self))))


def noise_schedule(
    kind: BetaKind = "scaled_linear",
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    count: int = 1000,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """The schedule that a checkpoint's scheduler configuration describes; by default Stable Diffusion's.

    `count` is T, the number of time steps; `beta_start` and `beta_end` do not matter to `squaredcos_cap_v2`
    (arXiv:2102.09672). Raises InputError for another `kind`.
    """
    _check_known("beta schedule", kind, BETAS)
    # Checkpoints were trained with betas in single precision, so the rounding to it is part of the schedule.
    alphas = 1 - BETAS[kind](beta_start, beta_end, count)
    alpha_bar = np.cumprod(alphas.double().numpy())
    if zero_terminal_snr:
        alpha_bar = _zero_terminal_snr(alpha_bar)
    return NoiseSchedule(alpha_bar=tuple(alpha_bar.tolist()))


def _linear(start: float, end: float, count: int) -> torch.Tensor:
    return torch.linspace(start, end, count, dtype=torch.float32, device="cpu")


def _squared_cosine(start: float, end: float, count: int) -> torch.Tensor:
    alpha_bar = [cos((i / count + 0.008) / 1.008 * pi / 2) ** 2 for i in range(count + 1)]
    betas = [min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32, device="cpu")


BETAS: dict[str, Callable[[float, float, int], torch.Tensor]] = {
    "scaled_linear": lambda start, end, count: _linear(sqrt(start), sqrt(end), count) ** 2,
    "linear": _linear,
    "squaredcos_cap_v2": _squared_cosine,
}
"""The beta schedules by the names that checkpoints use."""


def _zero_terminal_snr(alpha_bar: Floats) -> Floats:
    """The schedule shifted and stretched so that its last step is pure noise (arXiv:2305.08891, Alg. 1)."""
    root = np.sqrt(alpha_bar)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    levels: Floats = np.maximum(root**2, SMALLEST_ALPHA_BAR)
    return levels


ALIGN_YOUR_STEPS: dict[str, tuple[int, ...]] = {
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
"""Time steps for ten steps, optimised for each family of models (arXiv:2404.14507)."""


def sigmas_for(
    name: str,
    steps: int,
    schedule: NoiseSchedule,
    *,
    steps_offset: int = 0,
    final: Final = "zero",
    family: str = "sd",
    convention: TimestepConvention = "ddim",
) -> tuple[float, ...]:
    """The `steps` + 1 levels that a run visits, strictly falling: host floats.

    They end at 0, or with `final="sigma_min"` at the schedule's lowest level, which is what checkpoints mean
    by `set_alpha_to_one: false`. `steps_offset` belongs to `leading`, `family` to `align_your_steps`.

    - `leading`, `trailing`: whole time steps (arXiv:2305.08891, table 2); `multistep` reads `leading` without 0, and
      `lcm` as every so many of the 50 steps that its models were distilled on;
    - `linspace`: evenly from T - 1 to 0, rounded but for `euler`; `multistep` leaves out the 0;
    - `simple`: every (T / steps)-th level from the top; `sgm_uniform`: evenly, without 0;
    - `karras` (rho 7, arXiv:2206.00364 eq. 5), `exponential`: from the highest level to the lowest;
    - `align_your_steps`: arXiv:2404.14507, log-linear between its levels for other than ten steps.

    Where rounding would repeat a time step or leave 0 ... T - 1, the nearest falling ones are taken. Raises
    InputError for an unknown name or family, or steps outside 1 ... T.
    """
    _check_known("schedule", name, SCHEDULES)
    _check_known("family", family, ALIGN_YOUR_STEPS)
    count = len(schedule)
    if not 1 <= steps <= count:
        raise InputError(f"steps {steps} is not in 1 ... {count}; the nearest is {min(max(steps, 1), count)}")
    end = 0.0 if final == "zero" else schedule.sigmas[0]
    if name in TIMES:
        times = CONVENTIONS.get((name, convention), TIMES[name])(steps, count, steps_offset)
        levels = [schedule.t_to_sigma(t) for t in _falling(times, 0 if end == 0 else 1, count - 1)]
    else:
        levels = _curve(name, steps, schedule, family=family, end=end)
    return (*levels, end)


Times = Callable[[int, int, int], Floats]

TIMES: dict[str, Times] = {
    "leading": lambda steps, count, offset: np.arange(steps - 1.0, -1, -1) * (count // steps) + offset,
    "trailing": lambda steps, count, _: np.arange(count, 0, -count / steps)[:steps].round() - 1,
    "linspace": lambda steps, count, _: np.linspace(count - 1, 0, steps).round(),
    "simple": lambda steps, count, _: count - 1 - np.floor(np.arange(steps) * (count / steps)),
}
"""The time steps of the schedules that visit given ones, from steps, T and steps_offset."""

CONVENTIONS: dict[tuple[str, TimestepConvention], Times] = {
    ("leading", "multistep"): lambda steps, count, offset: np.arange(steps, 0.0, -1) * (count // (steps + 1)) + offset,
    ("leading", "lcm"): lambda steps, count, _: (50 - np.arange(0.0, steps) * 50 // steps) * (count // 50) - 1,
    ("linspace", "multistep"): lambda steps, count, _: np.linspace(0, count - 1, steps + 1).round()[:0:-1],
    ("linspace", "euler"): lambda steps, count, _: np.linspace(count - 1, 0, steps),
}
"""The same for those that read a name otherwise; `lcm` takes some of the 50 steps of arXiv:2310.04378."""

SCHEDULES = (*TIMES, "sgm_uniform", "karras", "exponential", "align_your_steps")
"""The names that `sigmas_for` knows."""


def _falling(times: Floats, lowest: int, highest: int) -> list[float]:
    """`times` moved into lowest ... highest and one apart, or closer where so many do not fit."""
    gap = min(1.0, (highest - lowest) / max(len(times) - 1, 1))
    fall = gap * np.arange(len(times))
    levelled = np.maximum.accumulate((times + fall)[::-1])[::-1]
    return list((np.clip(levelled, lowest + fall[-1], highest) - fall).tolist())


def _curve(name: str, steps: int, schedule: NoiseSchedule, *, family: str, end: float) -> list[float]:
    """The levels, without the final one, of the schedules that also visit what lies between time steps."""
    low, high = schedule.sigmas[0], schedule.sigmas[-1]
    part = np.linspace(0, 1, steps + 1)[:-1]  # of the way down, the end not among them
    to_low = np.linspace(0, 1, steps) if end == 0 else part
    match name:
        case "sgm_uniform":
            levels = np.array([schedule.t_to_sigma(t) for t in (len(schedule) - 1) * (1 - part)])
        case "karras":
            levels = (high ** (1 / 7) + to_low * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        case "exponential":
            levels = high * (low / high) ** to_low
        case _:
            knots = [log(schedule.t_to_sigma(t)) for t in ALIGN_YOUR_STEPS[family]]
            levels = np.exp(np.interp(part, np.linspace(0, 1, len(knots)), knots))
    return list(levels.tolist())


def _check_known(what: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise InputError(unknown(what, name, names))
