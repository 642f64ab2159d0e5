"""The face of a loaded model: its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Unpack

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
from fewstep.models.networks import Networks
from fewstep.notebook import table_of
from fewstep.pipeline.denoising import Model
from fewstep.pipeline.init_image import ImageLike, InitImage, fitted, read_init_image
from fewstep.pipeline.request import Request, SizeConditioning, TaskOptions, make_request
from fewstep.pipeline.result import Result
from fewstep.pipeline.run import Run
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.model import Loaded, ModelSpec
from fewstep.weights.save import save_model


class Pipeline:
    """Draws with one loaded model. `fewstep.load` makes it; `engine` defaults to the best here."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizers: Sequence[Tokenizer],
        engine: Engine,
        *,
        loaded: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec, self.tokenizers, self.engine = spec, tuple(tokenizers), engine
        self.loaded = dict(loaded or {})  # the arguments of `load`, for the pictures' metadata

    @classmethod
    def of(cls, model: Loaded, *, plain: bool = False, loaded: Mapping[str, Any] | None = None) -> Pipeline:
        """The pipeline of a model in memory, with the fastest engine for it, or the `plain` one."""
        engine = EagerEngine(model.spec, model.networks) if plain else select_engine(model.spec, model.networks)
        return cls(model.spec, model.tokenizers, engine, loaded=loaded)

    @property
    def networks(self) -> Networks:
        """The torch networks that the engine runs; InputError for an engine that has none."""
        networks = getattr(self.engine, "networks", None)
        if not isinstance(networks, Networks):
            raise InputError(f"{self.spec.name} is run from compiled files: its weights cannot be changed or saved")
        return networks

    @property
    def parts(self) -> NoReturn:
        """Refused: the name that `spec` and `networks` had together."""
        raise AttributeError("pipe.parts is now pipe.spec (what the model is), pipe.networks and pipe.tokenizers")

    def __repr__(self) -> str:
        return f"Pipeline({self.spec.name!r}, {self.spec.family}, {self.engine.device})"

    def _repr_html_(self) -> str:
        spec = self.spec
        rows: dict[str, object] = {"model": spec.name, "family": spec.family, "licence": spec.licence}
        if isinstance(networks := getattr(self.engine, "networks", None), Networks):
            rows["UNet"] = f"{sum(weight.numel() for weight in networks.unet.parameters()):,} parameters"
        rows["runs on"] = f"{self.engine.device}, {type(self.engine).__name__}"
        return table_of(rows | {name: value for name, value in vars(spec.defaults).items() if value is not None})

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
        init, factor, notes = None, self.spec.autoencoder.factor, list[str]()
        if self.spec.unet.in_channels == 9 and (image is None or mask is None):
            raise InputError(f"{self.spec.name} is an inpainting model; call inpaint() with a picture and a mask")
        if image is None and mask is not None:
            raise InputError("a mask needs a picture to lie on; give image too")
        if image is not None:
            if not (options.get("width") or options.get("height")):
                notes += self._fit(image, options)
            with engine_threads(self.engine):
                init = read_init_image(image, mask, options.get("width"), options.get("height"))
            options |= _size(init, factor)
        request = make_request(prompt, options, self.spec.defaults, multiple=factor, scheduler=self.spec.scheduler)
        if request.guidance.scale <= 1 and any(request.negative_prompts or ()):
            notes.append("The negative prompt has no effect without guidance: guidance_scale must be above 1.")
        extra: dict[str, Any] = {} if init is None else {"strength": float(strength)}
        second = None
        if refiner is not None:
            _check_refiner(self.spec, refiner.spec)
            second = refiner._model
            extra |= {"refiner": refiner.spec.name, "handoff": handoff}
        task = "text_to_image" if init is None else "image_to_image" if mask is None else "inpaint"
        run = Run(
            self._model,
            request,
            init=init,
            strength=strength if init else 1.0,
            refiner=second,
            handoff=handoff,
            settings={"task": task, "model": self.spec.name, **self.loaded} | _settings(request) | extra,
        )
        run.notes += tuple(notes)
        return run

    @property
    def _model(self) -> Model:
        return Model(spec=self.spec, tokenizers=self.tokenizers, engine=self.engine)

    def _fit(self, image: Any, options: TaskOptions) -> list[str]:
        """Set width and height for a picture that is too large to draw, and say so."""
        native = self.spec.defaults.width, self.spec.defaults.height
        size = fitted(image, native, self.spec.autoencoder.factor)
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
        chosen, networks = choose_device(device), self.networks
        wanted = choose_dtype(networks.dtype if dtype is None else dtype, chosen)
        layout = torch.channels_last if chosen.type == "cuda" else torch.preserve_format
        with networks.lock.changing():
            for network in networks:
                network.to(chosen, wanted, memory_format=layout)  # type: ignore[call-overload]
            plain = type(self.engine) is EagerEngine
            self.engine = EagerEngine(self.spec, networks) if plain else select_engine(self.spec, networks)
        return self

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image]:
        """Pictures of scaled latents (B, 4, h, w), such as those of a step."""
        with engine_threads(self.engine):
            return to_pil(self.engine.decode(latents))

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model to a new diffusers folder, which diffusers itself reads."""
        save_model(self, Path(folder), dtype=dtype)


def _check_picture(image: Any, name: str = "image") -> None:
    if image is None:
        raise InputError(f"{name} is None; give a picture, an array, a tensor or a path, or call text_to_image()")


def _check_refiner(base: ModelSpec, refiner: ModelSpec) -> None:
    """InputError for a model that cannot go on with the latents of another one."""
    if bool(base.unet.addition) != bool(refiner.unet.addition) or refiner.unet.in_channels != 4:
        raise InputError(
            f"{refiner.name} cannot refine what {base.name} draws: expected two SDXL models, such as 'sdxl-base' and "
            "'sdxl-refiner', or two that are none, and no inpainting model as the refiner"
        )
    first, second = ((vae.factor, vae.scaling_factor) for vae in (base.autoencoder, refiner.autoencoder))
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


def _size(init: InitImage, factor: int) -> TaskOptions:
    height, width = init.image.shape[2:]
    scale = factor if init.is_latent else 1
    return {"width": width * scale, "height": height * scale}


def _settings(request: Request) -> dict[str, Any]:
    """What of `request` goes into a picture's metadata, all but its seed."""
    guidance = request.guidance
    settings: dict[str, Any] = {
        "prompt": _one(request.prompts),
        "negative_prompt": request.negative_prompts and _one(request.negative_prompts),
        "steps": request.steps,
        "guidance_scale": guidance.scale,
        "sampler": request.sampler,
        "schedule": request.schedule,
        "width": request.width,
        "height": request.height,
    }
    unusual = {
        "guidance_rescale": (guidance.rescale, 0.0),
        "guidance_interval": (guidance.interval, Guidance().interval),
        "eta": (request.eta, None),
        "size_conditioning": (request.size_conditioning, SizeConditioning()),
        "chunk": (request.chunk, True),
    }
    return settings | {name: value for name, (value, usual) in unusual.items() if value != usual}


def _one(texts: tuple[str, ...]) -> str | list[str]:
    return texts[0] if len(set(texts)) == 1 else list(texts)
