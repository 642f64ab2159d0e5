"""What a checkpoint says about its noise levels: scheduler_config.json, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Any

from fewstep.diffusion.denoiser import Prediction
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import BETAS, BetaKind, Final, NoiseSchedule, noise_schedule
from fewstep.errors import CheckpointError, quoted, unknown
from fewstep.models.zoo import Family

MOST_TRAIN_STEPS = 100_000
_MULTISTEP = "DPMSolverMultistepScheduler"  # three samplers, told apart by their settings
_SAMPLERS = {  # by the class; the first one of a sampler is the one to write
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    _MULTISTEP: "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "plms",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "KDPM2DiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "dpmpp_2m",
}
_STAND_INS = tuple(_SAMPLERS)[-5:]  # samplers that fewstep has not, by its nearest one; the noise levels are the same
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
_CLIPPING = ("ddim", "ddpm")  # the samplers whose classes clip unless the file says otherwise
_CURVES = ("karras", "exponential")
_HARMLESS: dict[str, tuple[Any, ...]] = {  # settings that would change the picture: the values with which they do not
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-inf, None),
    "lower_order_final": (True,),
    "original_inference_steps": (50,),
    "predict_x0": (True,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "set_alpha_to_one": (None, True, False),
    "shift_terminal": (None,),
    "thresholding": (False,),
    "timestep_scaling": (10.0,),
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None, True),
    "use_flow_sigmas": (False,),
    "use_karras_sigmas": (False, None, True),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small"),
}
_USUAL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_USUAL: dict[str, dict[str, Any]] = {  # what absence means to some classes
    "DPMSolverSDEScheduler": _USUAL_BETAS,
    "HeunDiscreteScheduler": _USUAL_BETAS,
    "KDPM2AncestralDiscreteScheduler": _USUAL_BETAS,
    "KDPM2DiscreteScheduler": _USUAL_BETAS,
    "LCMScheduler": {**_USUAL_BETAS, "beta_schedule": "scaled_linear"},
}
_RANGE = ("beta_start", "beta_end", "train_steps")
_SETTINGS: dict[str, tuple[str, Any]] = {  # our name, theirs, and what its absence means
    "beta_schedule": ("beta_schedule", "linear"),
    "beta_start": ("beta_start", 0.0001),
    "beta_end": ("beta_end", 0.02),
    "train_steps": ("num_train_timesteps", 1000),
    "prediction": ("prediction_type", "epsilon"),
    "steps_offset": ("steps_offset", 0),
    "zero_terminal_snr": ("rescale_betas_zero_snr", False),
}


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The noise levels a checkpoint was trained at, and how it is usually sampled; the defaults are SD 1's.

    `sampler`: its name in `diffusion`. `spacing`, `curve` (karras or exponential): the schedules that the file names,
    None where it names none; then each sampler has its own, see `schedule_for`. `final`: where a run ends, at 0 or at
    the lowest trained level (`set_alpha_to_one: false`), None likewise. `train_steps`: T, the number of time steps.
    `stands_in_for`: the file's class where `sampler` is but the nearest one to it.
    """

    sampler: str = "plms"
    beta_schedule: BetaKind = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    prediction: Prediction = "epsilon"
    spacing: str | None = None
    curve: str | None = None
    steps_offset: int = 1
    final: Final | None = "sigma_min"
    zero_terminal_snr: bool = False
    stands_in_for: str = ""

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise levels themselves."""
        return noise_schedule(
            self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            count=self.train_steps,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    def schedule_for(self, sampler: str) -> str:
        """The schedule of `sampler` where the user names none: the checkpoint's, else that of diffusers' class."""
        spec = SAMPLERS[sampler]
        named = None if spec.consistency else self.spacing  # that class reads no spacing
        return (spec.curves and self.curve) or named or spec.spacing

    def sampled_by(self, sampler: str, spacing: str | None) -> SchedulerConfig:
        """The same noise levels with another sampler and schedule, as after a distillation."""
        return replace(self, sampler=sampler, spacing=spacing, curve=None, stands_in_for="")

    def final_for(self, sampler: str) -> Final:
        """Where a run of `sampler` ends."""
        if not SAMPLERS[sampler].may_end_above_zero:
            return "zero"
        return self.final or ("sigma_min" if sampler == "plms" else "zero")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """From a scheduler_config.json; CheckpointError for one whose pictures would come out different here."""
        sampler = _sampler(config)
        name = str(config["_class_name"])
        config = {**_USUAL.get(name, {}), **config}
        _refuse(config, sampler)
        to_one = config.get("set_alpha_to_one")
        read = cls(
            sampler=sampler,
            spacing=config.get("timestep_spacing"),
            stands_in_for=name if name in _STAND_INS else "",
            curve=next((name for name in _CURVES if config.get(f"use_{name}_sigmas")), None),
            final=None if to_one is None else "zero" if to_one else "sigma_min",
            **{ours: _setting(config, theirs, usual) for ours, (theirs, usual) in _SETTINGS.items()},
        )
        if not all(1 > before > after > 0 for before, after in pairwise(read.noise_schedule.alpha_bar)):
            raise CheckpointError(
                f"scheduler: betas from {read.beta_start} to {read.beta_end} leave no signal or noise"
            )
        return read

    @property
    def substitution(self) -> str:
        """The sentence about `sampler` where the file names one that fewstep has not; else empty."""
        return self.stands_in_for and f"{self.stands_in_for} is not implemented; {self.sampler} stands in for it"

    def to_diffusers(self) -> dict[str, Any]:
        """A scheduler_config.json that says the same to diffusers."""
        sde = self.sampler in ("dpmpp_2m_sde", "dpmpp_3m_sde")
        name = _MULTISTEP if sde else next(theirs for theirs, ours in _SAMPLERS.items() if ours == self.sampler)
        config = {"_class_name": name} | {theirs: getattr(self, ours) for ours, (theirs, _) in _SETTINGS.items()}
        config |= {"clip_sample": False, "skip_prk_steps": True}
        if sde:
            config |= {"algorithm_type": "sde-dpmsolver++", "solver_order": int(self.sampler[6])}
        named = {"timestep_spacing": self.spacing, f"use_{self.curve}_sigmas": self.curve and True}
        named["set_alpha_to_one"] = self.final and self.final == "zero"
        return config | {name: value for name, value in named.items() if value is not None}


def usual_scheduler(family: Family, prediction: Prediction = "epsilon") -> SchedulerConfig:
    """What the published models of `family` say; for single files, which say nothing."""
    sampler = {"sd1": "plms", "sd2": "ddim"}.get(family, "euler")
    return SchedulerConfig(
        sampler=sampler, prediction=prediction, spacing=None if family in ("sd1", "sd2") else "leading"
    )


def _setting(config: Mapping[str, Any], name: str, usual: Any) -> Any:
    value = config.get(name, usual)
    kinds = (int, float) if isinstance(usual, float) else type(usual)
    number = isinstance(usual, int | float) and not isinstance(usual, bool)
    if not isinstance(value, kinds) or (number and (isinstance(value, bool) or not 0 <= value <= MOST_TRAIN_STEPS)):
        raise CheckpointError(f"scheduler: {name} is {quoted(value)}; expected something like {usual!r}")
    return value


def _sampler(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name"))
    if name not in _SAMPLERS:
        raise CheckpointError(unknown("scheduler _class_name", name[:80], _SAMPLERS))
    if name == _MULTISTEP and config.get("algorithm_type") == "sde-dpmsolver++":
        return "dpmpp_3m_sde" if config.get("solver_order") == 3 else "dpmpp_2m_sde"
    return _SAMPLERS[name]


def _refuse(config: Mapping[str, Any], sampler: str) -> None:
    """CheckpointError for settings under which diffusers would draw another picture than fewstep."""
    allowed = {**_HARMLESS, "prediction_type": PREDICTIONS, "beta_schedule": tuple(BETAS)}
    allowed |= {"solver_order": (3,) if sampler == "dpmpp_3m_sde" else (2,)}
    allowed |= {"skip_prk_steps": (True,)} if sampler == "plms" else {}
    if config.get("use_karras_sigmas"):
        allowed["use_exponential_sigmas"] = (False, None)
    if config["_class_name"] in _STAND_INS:
        allowed = {key: values for key, values in allowed.items() if not key.startswith(("solver", "lower_order"))}
    unsaid = {"clip_sample": sampler in _CLIPPING, "skip_prk_steps": False}
    for key, values in allowed.items():
        value = config.get(key, unsaid.get(key, values[0]))
        if value not in values:
            others = " or ".join(repr(each) for each in values)
            raise CheckpointError(f"scheduler: {key} is {quoted(value)}; fewstep draws with {others} alone")
    spec, curves = SAMPLERS[sampler], [curve for curve in _CURVES if config.get(f"use_{curve}_sigmas")]
    if (
        curves
        and spec.curves
        and spec.convention == "euler"
        and config.get("timestep_spacing") in ("leading", "trailing")
    ):
        raise CheckpointError(
            f"scheduler: use_{curves[0]}_sigmas with timestep_spacing {config['timestep_spacing']!r} leaves out the "
            "ends of the curve in this class; fewstep draws with the whole curve alone: take the timestep_spacing away"
        )
    start, end, count = (_setting(config, name, usual) for name, usual in (_SETTINGS[key] for key in _RANGE))
    if not 0 < start <= end < 1 or count < 2:
        raise CheckpointError(
            f"scheduler: beta_start {start}, beta_end {end} and num_train_timesteps {count} are no noise schedule; "
            "expected 0 < beta_start <= beta_end < 1 and at least 2 steps"
        )
