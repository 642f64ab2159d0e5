"""The options of a task, checked and completed with the model's defaults."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from fewstep.diffusion.guidance import Guidance
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.diffusion.schedule import SCHEDULES
from fewstep.errors import InputError, quoted, unknown
from fewstep.models.zoo import Defaults
from fewstep.rng import seeds_for
from fewstep.weights.scheduler import SchedulerConfig

Output = Literal["pil", "numpy", "latent"]
SIDES = (64, 8192)
SAMPLER_WORDS = {
    **{name.replace("_", ""): name for name in SAMPLERS},
    "eulera": "euler_ancestral",
    "pndm": "plms",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsolversde": "dpmpp_sde",
    "unipcmultistep": "unipc",
}
"""Samplers by what other programs call them, without blanks and signs."""
ELSEWHERE = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "images_per_prompt",
    "generator": "seed",
    "output_type": "output",
    "callback": "on_step",
    "callback_on_step_end": "on_step",
    "scheduler": "sampler",
    "denoising_end": "handoff",
    "original_size": "size_conditioning",
    "target_size": "size_conditioning",
}
"""Our name for each option that diffusers calls otherwise."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State after a step: its index (from 0), their total, the noise level reached, and the predicted result.

    `x0` (B, 4, h, w) are scaled latents; `Pipeline.decode` makes pictures of them.
    """

    index: int
    total: int
    sigma: float
    x0: Tensor


@dataclass(frozen=True, kw_only=True)
class SizeConditioning:
    """The sizes that condition SDXL (arXiv:2307.01952, sec. 2.2), all (height, width) in pixels.

    None is the size drawn. The aesthetic scores, 1 to 10, are read by the refiner alone.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


class TaskOptions(TypedDict, total=False):
    """The keywords that all tasks share; see `Pipeline.text_to_image`."""

    negative_prompt: str | Sequence[str] | None
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    sampler: str | None
    schedule: str | None
    eta: float | None
    width: int | None
    height: int | None
    images_per_prompt: int
    seed: int | Sequence[int] | None
    latents: Tensor | None
    output: Output
    on_step: Callable[[Progress], None] | None
    progress: bool
    size_conditioning: SizeConditioning
    chunk: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of a task with every option set; one row a picture."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    steps: int
    guidance: Guidance
    sampler: str
    schedule: str
    eta: float | None
    width: int
    height: int
    seeds: tuple[int, ...]
    latents: Tensor | None
    output: Output
    size_conditioning: SizeConditioning
    chunk: bool


def make_request(
    prompt: str | Sequence[str],
    options: TaskOptions,
    native: Defaults,
    *,
    multiple: int = 8,
    scheduler: SchedulerConfig | None = None,
) -> Request:
    """The request that `prompt` and `options` describe; InputError says what is wrong with a value and what to do."""
    _check_names(options)
    given = {key: _plain(value) for key, value in options.items() if value is not None}
    sampler, named = sampler_named(given.get("sampler", native.sampler))
    schedule = named or native.schedule or (scheduler or SchedulerConfig()).schedule_for(sampler)
    per_prompt = _number("images_per_prompt", given.get("images_per_prompt", 1), 1, 1000, whole=True)
    prompts = _repeated(_texts("prompt", prompt), per_prompt)
    return Request(
        prompts=prompts,
        negative_prompts=_negatives(options.get("negative_prompt"), len(prompts), per_prompt),
        steps=_number("steps", given.get("steps", native.steps), 1, 1000, whole=True),
        guidance=_guidance(given, native.guidance_scale),
        sampler=sampler,
        schedule=_one_of("schedule", given.get("schedule", schedule), SCHEDULES),
        eta=None if "eta" not in given else _number("eta", given["eta"], 0, 1),
        width=side("width", given.get("width", native.width), multiple),
        height=side("height", given.get("height", native.height), multiple),
        seeds=seeds_for(options.get("seed"), len(prompts)),
        latents=_latents(options.get("latents")),
        output=_one_of("output", given.get("output", "pil"), ("pil", "numpy", "latent")),
        size_conditioning=options.get("size_conditioning") or SizeConditioning(),
        chunk=bool(given.get("chunk", True)),
    )


def sampler_named(name: Any) -> tuple[str, str | None]:
    """The sampler, and the schedule if the name says one: "DPM++ 2M Karras" is dpmpp_2m on karras.

    Takes fewstep's names, those of other programs' menus, and of diffusers' classes. InputError for another.
    """
    if isinstance(name, str) and name in SAMPLERS:
        return name, None
    word = re.sub(r"[^a-z0-9]|scheduler|discrete", "", str(name).lower().replace("++", "pp"))
    schedule = next((end for end in ("karras", "exponential") if word.endswith(end)), None)
    word = word.removesuffix(schedule or "")
    found = SAMPLER_WORDS.get(word) or SAMPLER_WORDS.get(word.removeprefix("sample").removeprefix("k"))
    if found is None:
        raise InputError(unknown("sampler", name if isinstance(name, str) else quoted(name), SAMPLERS))
    return found, schedule


def _check_names(options: TaskOptions) -> None:
    for key in options:
        if key in ELSEWHERE:
            raise InputError(f"{key} is called {ELSEWHERE[key]} here")
        _one_of("option", key, tuple(TaskOptions.__annotations__))


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; all else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _latents(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"latents are a {type(value).__name__}; expected a tensor or an array of numbers") from error


def side(name: str, value: Any, multiple: int) -> int:
    """`value` if it is a side that the model can draw, in pixels; otherwise InputError names the nearest ones."""
    pixels: int = _number(name, value, *SIDES, whole=True)
    if pixels % multiple:
        low = pixels // multiple * multiple
        raise InputError(f"{name} {pixels} is not a multiple of {multiple}; the nearest are {low} and {low + multiple}")
    return pixels


def strength_steps(steps: int, strength: float) -> int:
    """The number of steps image-to-image runs, `int(steps * strength)`; InputError if that is none."""
    _number("strength", strength, 0, 1)
    count = int(steps * strength)
    if count < 1:
        raise InputError(
            f"strength {strength:g} with {steps} steps runs no step, since int(steps * strength) is 0; "
            f"the smallest strength that runs one is {ceil(1000 / steps) / 1000:g}"
        )
    return count


def _guidance(given: Mapping[str, Any], scale: float) -> Guidance:
    low, high = given.get("guidance_interval", (0.0, inf))
    if not 0 <= low <= high:
        raise InputError(
            f"guidance_interval ({low}, {high}) is not (lowest sigma, highest sigma) with 0 <= low <= high"
        )
    return Guidance(
        scale=_number("guidance_scale", given.get("guidance_scale", scale), 0, 100),
        rescale=_number("guidance_rescale", given.get("guidance_rescale", 0.0), 0, 1),
        interval=(float(low), float(high)),
    )


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} {quoted(value)} is not a text or a list of texts")
    return texts


def _repeated(texts: tuple[str, ...], times: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(times))


def _negatives(value: str | Sequence[str] | None, count: int, per_prompt: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return (value,) * count
    negatives = _repeated(_texts("negative_prompt", value), per_prompt)
    if len(negatives) != count:
        given, wanted = len(negatives) // per_prompt, count // per_prompt
        raise InputError(f"{given} negative prompts for {wanted} prompts; give one, or one for each")
    return negatives


def _number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
        near = ""
        if isinstance(value, int | float) and value == value:  # NaN is near nothing
            nearest = min(max(value, low), high)
            near = f"; the nearest is {round(nearest) if whole else nearest}"
        raise InputError(f"{name} {quoted(value)} is not a {'whole ' * whole}number from {low:g} to {high:g}{near}")
    return value


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise InputError(unknown(name, value, known))
    return value
