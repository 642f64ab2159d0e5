"""The face of a loaded model: its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL.Image import Image
from torch import Tensor

from fewstep.diffusion.guidance import Guidance
from fewstep.engines.cpu.limits import engine_threads
from fewstep.engines.device import choose_device, choose_dtype
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Engine
from fewstep.engines.select import select_engine
from fewstep.errors import InputError
from fewstep.images import to_pil
from fewstep.notebook import table_of
from fewstep.pipeline.denoising import Model
from fewstep.pipeline.init_image import Canvas, ImageLike, fitted, read_canvas
from fewstep.pipeline.request import Job, SizeConditioning, TaskOptions, make_job
from fewstep.pipeline.result import Result
from fewstep.pipeline.run import Run
from fewstep.weights.parts import Parts
from fewstep.weights.save import save_parts


class Pipeline:
    """Draws with one loaded model. `fewstep.load` makes it; `engine` defaults to the best here."""

    def __init__(self, parts: Parts, engine: Engine | None = None, *, loaded: Mapping[str, Any] | None = None) -> None:
        self.parts = parts
        self.loaded = dict(loaded or {})  # what was asked of `load`, for the pictures' metadata
        self.engine: Engine = engine or select_engine(parts)

    def __repr__(self) -> str:
        return f"Pipeline({self.parts.name!r}, {self.parts.family}, {self.engine.device})"

    def _repr_html_(self) -> str:
        parts = self.parts
        rows: dict[str, object] = {"model": parts.name, "family": parts.family, "licence": parts.licence}
        rows["UNet"] = f"{sum(weight.numel() for weight in parts.unet.parameters()):,} parameters"
        rows["runs on"] = f"{self.engine.device}, {type(self.engine).__name__}"
        return table_of(rows | {name: value for name, value in vars(parts.defaults).items() if value is not None})

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        refiner: Pipeline | None = None,
        handoff: float = 0.8,
        **options: Unpack[TaskOptions],
    ) -> Result:
        """Pictures of `prompt`: one for each text and each of `images_per_prompt`.

        Options of all tasks, each with the model's own default:

        - `negative_prompt`: what to steer away from; read only with `guidance_scale` > 1;
        - `steps` 1..1000, `guidance_scale` 0..100, `guidance_rescale` 0..1, `guidance_interval` (low, high sigma);
        - `sampler` and `schedule`: names in `fewstep.SAMPLERS` and `fewstep.SCHEDULES`; `eta` 0..1 for some samplers;
        - `width`, `height` in pixels, multiples of 8; `size_conditioning` tells SDXL another size;
        - `seed`: an int (counting up over the pictures), one for each picture, or None for fresh ones;
        - `latents`: unit-variance noise (B, 4, h, w) to start from instead of the seed's;
        - `output`: "pil", "numpy", or "latent", which decodes nothing;
        - `on_step`: called with a `Progress` after each step; `progress`: True shows a bar;
        - `chunk`: False cuts prompts longer than the text window, instead of reading them in pieces.

        With `refiner`, an SDXL refiner takes over after the fraction `handoff` of the noise levels. Raises InputError
        for a value that cannot be used, NotFiniteError for NaN.
        """
        return _finished(self.start(prompt, refiner=refiner, handoff=handoff, **options), options)

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: ImageLike | Sequence[ImageLike],
        *,
        strength: float = 0.8,
        **options: Unpack[TaskOptions],
    ) -> Result:
        """Pictures of `prompt` that start from `image` under noise (SDEdit, arXiv:2108.01073).

        Runs the last `int(steps * strength)` steps; InputError gives the smallest strength when that is none. `image`
        is one picture or one for each prompt: PIL, array, tensor, latents or path. `width` and `height` resize it;
        without them a picture of over twice the model's area is drawn smaller, and a note says so. An SDXL refiner
        polishes a finished picture this way. The other options are those of `text_to_image`.
        """
        _check_picture(image)
        return _finished(self.start(prompt, image=image, strength=strength, **options), options)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: ImageLike | Sequence[ImageLike],
        mask: ImageLike,
        *,
        strength: float = 1.0,
        **options: Unpack[TaskOptions],
    ) -> Result:
        """Pictures that keep `image` where `mask` is black and follow `prompt` where it is white.

        Works with every model by blending latents, and better with inpainting UNets (9 input channels). The other
        options are those of `image_to_image`.
        """
        _check_picture(image)
        _check_picture(mask, "mask")
        return _finished(self.start(prompt, image=image, mask=mask, strength=strength, **options), options)

    def start(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask: ImageLike | None = None,
        strength: float = 1.0,
        refiner: Pipeline | None = None,
        handoff: float = 0.8,
        **options: Unpack[TaskOptions],
    ) -> Run:
        """A task under way: iterate it for previews, cancelling and custom loops, then call `result()` on it."""
        canvas, factor, notes = None, self.parts.autoencoder.config.factor, list[str]()
        if self.parts.unet.config.in_channels == 9 and (image is None or mask is None):
            raise InputError(f"{self.parts.name} is an inpainting model; call inpaint() with a picture and a mask")
        if image is None and mask is not None:
            raise InputError("a mask needs a picture to lie on; give image too")
        if image is not None:
            if not (options.get("width") or options.get("height")):
                notes += self._fit(image, options)
            with engine_threads(self.engine):
                canvas = read_canvas(image, mask, options.get("width"), options.get("height"))
            options |= _size(canvas, factor)
        job = make_job(prompt, options, self.parts.defaults, multiple=factor, scheduler=self.parts.scheduler)
        if job.guidance.scale <= 1 and any(job.negative_prompts or ()):
            notes.append("The negative prompt has no effect without guidance: guidance_scale must be above 1.")
        extra: dict[str, Any] = {} if canvas is None else {"strength": float(strength)}
        second = None
        if refiner is not None:
            _check_refiner(self.parts, refiner.parts)
            second = Model(parts=refiner.parts, engine=refiner.engine)
            extra |= {"refiner": refiner.parts.name, "handoff": handoff}
        task = "text_to_image" if canvas is None else "image_to_image" if mask is None else "inpaint"
        run = Run(
            Model(parts=self.parts, engine=self.engine),
            job,
            canvas=canvas,
            strength=strength if canvas else 1.0,
            refiner=second,
            handoff=handoff,
            settings={"task": task, "model": self.parts.name, **self.loaded} | _settings(job) | extra,
        )
        run.notes += tuple(notes)
        return run

    def _fit(self, image: Any, options: TaskOptions) -> list[str]:
        """Set width and height for a picture that is too large to draw, and say so."""
        native = self.parts.defaults.width, self.parts.defaults.height
        size = fitted(image, native, self.parts.autoencoder.config.factor)
        if size is None:
            return []
        options |= {"width": size[0], "height": size[1]}
        return [
            f"The picture is drawn at {size[0]}x{size[1]}, about the model's own size; ask for another if you like."
        ]

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> Pipeline:
        """Move the model to a device, and to a number format; takes the engine that is best there; returns itself.

        The plain engine stays the plain engine. Raises InputError for what this machine has not.
        """
        chosen, parts = choose_device(device), self.parts
        kept = choose_dtype(parts.unet.conv_in.weight.dtype if dtype is None else dtype, chosen)
        with parts.lock.changing():
            for network in (parts.unet, parts.autoencoder, *parts.text_encoders, parts.tiny):
                if network is not None:
                    network.to(chosen, kept)
            self.engine = EagerEngine(parts) if type(self.engine) is EagerEngine else select_engine(parts)
        return self

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image]:
        """Pictures of scaled latents (B, 4, h, w), such as those of a step."""
        with engine_threads(self.engine):
            return to_pil(self.engine.decode(latents))

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model to a new diffusers folder, which diffusers itself reads."""
        save_parts(self.parts, Path(folder), dtype=dtype)


def _check_picture(image: Any, name: str = "image") -> None:
    if image is None:
        raise InputError(f"{name} is None; give a picture, an array, a tensor or a path, or call text_to_image()")


def _check_refiner(base: Parts, refiner: Parts) -> None:
    """InputError for a model that cannot go on with the latents of another one."""
    if bool(base.unet.config.addition) != bool(refiner.unet.config.addition) or refiner.unet.config.in_channels != 4:
        raise InputError(
            f"{refiner.name} cannot refine what {base.name} draws: expected two SDXL models, such as 'sdxl-base' and "
            "'sdxl-refiner', or two that are none, and no inpainting model as the refiner"
        )
    first, second = ((vae.config.factor, vae.config.scaling_factor) for vae in (base.autoencoder, refiner.autoencoder))
    if first != second:
        raise InputError(
            f"{base.name} and {refiner.name} have other latents: of 1/{first[0]} and 1/{second[0]} of a picture's "
            f"side, scaled by {first[1]} and {second[1]}"
        )


def _finished(run: Run, options: TaskOptions) -> Result:
    on_step = options.get("on_step")
    if on_step is None and not options.get("progress"):
        return run.result()
    steps = iter(run)
    if options.get("progress"):
        from rich.progress import track

        steps = iter(track(steps, "drawing", total=len(run)))
    for progress in steps:
        if on_step is not None:
            on_step(progress)
    return run.result()


def _size(canvas: Canvas, factor: int) -> TaskOptions:
    height, width = canvas.image.shape[2:]
    scale = factor if canvas.is_latent else 1
    return {"width": width * scale, "height": height * scale}


def _settings(job: Job) -> dict[str, Any]:
    """What of `job` goes into a picture's metadata, all but its seed."""
    guidance = job.guidance
    settings: dict[str, Any] = {
        "prompt": _one(job.prompts),
        "negative_prompt": job.negative_prompts and _one(job.negative_prompts),
        "steps": job.steps,
        "guidance_scale": guidance.scale,
        "sampler": job.sampler,
        "schedule": job.schedule,
        "width": job.width,
        "height": job.height,
    }
    unusual = {
        "guidance_rescale": (guidance.rescale, 0.0),
        "guidance_interval": (guidance.interval, Guidance().interval),
        "eta": (job.eta, None),
        "size_conditioning": (job.size_conditioning, SizeConditioning()),
        "chunk": (job.chunk, True),
    }
    return settings | {name: value for name, (value, usual) in unusual.items() if value != usual}


def _one(texts: tuple[str, ...]) -> str | list[str]:
    return texts[0] if len(set(texts)) == 1 else list(texts)
