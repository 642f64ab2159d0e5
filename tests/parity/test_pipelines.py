"""Whole pipelines against diffusers: same weights, same noise, same latents and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep import Pipeline
from tests import oracles

PUBLISHED = {"set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False, "steps_offset": 1}
"""What every published scheduler_config.json of the family says, whichever class reads it."""

PROMPT, NEGATIVE = "a red cube on top of a blue sphere", "ugly photo"
SCHEDULERS: dict[str, Any] = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "plms": diffusers.PNDMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
Pair = tuple[Any, Pipeline]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """`pair(kind)`: the diffusers pipeline, and ours loaded from the folder it saved."""
    oracles.quiet()

    @cache
    def make(kind: str) -> Pair:
        folder = tmp_path_factory.mktemp(kind)
        theirs = oracles.pipeline(kind, folder)
        theirs.save_pretrained(folder / "model")
        theirs.set_progress_bar_config(disable=True)
        published = folder / "model" / "scheduler" / "scheduler_config.json"
        published.write_text(json.dumps(json.loads(published.read_text()) | PUBLISHED))
        return theirs, fewstep.load(folder / "model", device="cpu")

    return make


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-4) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= limit, f"largest relative difference {error:.2e}"


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max()
    assert difference <= 1, f"pictures differ by {difference}/255"


def use(theirs: Any, sampler: str, spacing: str = "leading") -> None:
    """Another sampler, as a user of diffusers would change it."""
    known = ("beta_schedule", "beta_start", "beta_end", "prediction_type")
    config = {key: theirs.scheduler.config[key] for key in known} | PUBLISHED | {"timestep_spacing": spacing}
    theirs.scheduler = SCHEDULERS[sampler].from_config(config)


def noise(seed: int = 3, rows: int = 1, side: int = 8) -> torch.Tensor:
    return torch.randn((rows, 4, side, side), generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def hole(size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (16, 8, 48, 56))
    return mask


# PLMS on v-prediction mixes unlike outputs in diffusers: see test_samplers.py
EVERY = ("plms", "ddim", "euler", "heun", "dpmpp_2m", "unipc")
PAIRS = [(kind, sampler) for kind in ("sd1", "sd2", "sdxl") for sampler in EVERY if (kind, sampler) != ("sd2", "plms")]


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
@pytest.mark.parametrize(("kind", "sampler"), PAIRS)
def test_text_to_image(pair: Callable[[str], Pair], kind: str, sampler: str, guidance_scale: float) -> None:
    theirs, ours = pair(kind)
    use(theirs, sampler)
    wanted = theirs(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        latents=noise(),
        output_type="latent",
        height=64,
        width=64,
    ).images
    result = ours.text_to_image(
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=6,
        guidance_scale=guidance_scale,
        sampler=sampler,
        schedule="leading",
        width=64,
        height=64,
        latents=noise(),
        output="latent",
    )
    assert_close(result.latents, wanted)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["turbo", "sdxl-turbo"])
def test_turbo_uses_its_own_defaults(pair: Callable[[str], Pair], kind: str, steps: int) -> None:
    theirs, ours = pair(kind)
    seeded = {"num_inference_steps": steps, "guidance_scale": 0.0, "height": 64, "width": 64}
    wanted = theirs(PROMPT, **seeded, generator=generators(5)).images[0]
    result = ours.text_to_image(PROMPT, steps=steps, seed=5, width=64, height=64)
    assert_same_picture(result.images[0], wanted)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_pictures_of_a_seeded_batch(pair: Callable[[str], Pair], kind: str) -> None:
    theirs, ours = pair(kind)
    use(theirs, "euler_ancestral")
    prompts = [PROMPT, "a blue sphere"]
    size = {"height": 72, "width": 104}
    wanted = theirs(prompts, num_inference_steps=4, guidance_scale=4.0, generator=generators(5, 9), **size).images
    result = ours.text_to_image(
        prompts, steps=4, guidance_scale=4.0, sampler="euler_ancestral", schedule="leading", seed=(5, 9), **size
    )
    for mine, other in zip(result.images, wanted, strict=True):
        assert_same_picture(mine, other)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_image_to_image(pair: Callable[[str], Pair], kind: str, sampler: str) -> None:
    theirs, ours = pair(kind)
    use(theirs, sampler)
    cls = diffusers.StableDiffusionXLImg2ImgPipeline if kind == "sdxl" else diffusers.StableDiffusionImg2ImgPipeline
    task = cls.from_pipe(theirs)
    task.set_progress_bar_config(disable=True)
    settings = {"strength": 0.6, "guidance_scale": 4.0}
    common = {"num_inference_steps": 7, "generator": generators(11), "negative_prompt": NEGATIVE}
    wanted = task(PROMPT, image=picture(), **settings, **common, output_type="latent").images
    result = ours.image_to_image(
        PROMPT,
        picture(),
        **settings,
        negative_prompt=NEGATIVE,
        steps=7,
        seed=11,
        sampler=sampler,
        schedule="leading",
        output="latent",
    )
    assert_close(result.latents, wanted)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("kind", ["sd1", "inpaint", "sdxl"])
def test_inpaint(pair: Callable[[str], Pair], kind: str, sampler: str, strength: float) -> None:
    theirs, ours = pair(kind)
    use(theirs, sampler)
    cls = diffusers.StableDiffusionXLInpaintPipeline if kind == "sdxl" else diffusers.StableDiffusionInpaintPipeline
    task = cls.from_pipe(theirs)
    task.set_progress_bar_config(disable=True)
    wanted = task(
        PROMPT,
        image=picture(),
        mask_image=hole(),
        height=64,
        width=64,
        strength=strength,
        num_inference_steps=6,
        guidance_scale=3.0,
        negative_prompt=NEGATIVE,
        generator=generators(2),
        output_type="latent",
    ).images
    result = ours.inpaint(
        PROMPT,
        picture(),
        hole(),
        strength=strength,
        steps=6,
        guidance_scale=3.0,
        negative_prompt=NEGATIVE,
        seed=2,
        sampler=sampler,
        schedule="leading",
        output="latent",
    )
    assert_close(result.latents, wanted)


@pytest.mark.parametrize("handoff", [0.5, 0.8])
def test_refiner_takes_over(pair: Callable[[str], Pair], handoff: float) -> None:
    base, ours = pair("sdxl")
    refiner, our_refiner = pair("refiner")
    use(base, "euler")
    use(refiner, "euler")
    common = {"num_inference_steps": 10, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    latents = base(
        PROMPT, **common, height=64, width=64, latents=noise(), denoising_end=handoff, output_type="latent"
    ).images
    wanted = refiner(PROMPT, **common, image=latents, denoising_start=handoff, output_type="latent").images
    result = ours.text_to_image(
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=10,
        guidance_scale=4.0,
        sampler="euler",
        schedule="leading",
        width=64,
        height=64,
        latents=noise(),
        refiner=our_refiner,
        handoff=handoff,
        output="latent",
    )
    assert_close(result.latents, wanted)


def test_refiner_polishes_a_finished_picture(pair: Callable[[str], Pair]) -> None:
    refiner, ours = pair("refiner")
    use(refiner, "euler")
    wanted = refiner(
        PROMPT,
        image=picture(),
        strength=0.4,
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=generators(3),
    ).images[0]
    result = ours.image_to_image(
        PROMPT, picture(), strength=0.4, steps=10, guidance_scale=4.0, sampler="euler", schedule="leading", seed=3
    )
    assert_same_picture(result.images[0], wanted)


def test_size_conditioning_reaches_the_model(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair("sdxl")
    use(theirs, "euler")
    sizes = {"original_size": (48, 40), "crops_coords_top_left": (4, 8), "target_size": (96, 80)}
    common = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 64, "width": 64, "latents": noise()}
    wanted = theirs(PROMPT, **common, **sizes, output_type="latent").images
    ours_too = fewstep.SizeConditioning(original=(48, 40), crop=(4, 8), target=(96, 80))
    settings = {"steps": 3, "guidance_scale": 1.0, "width": 64, "height": 64, "sampler": "euler"}
    result = ours.text_to_image(
        PROMPT, **settings, schedule="leading", latents=noise(), size_conditioning=ours_too, output="latent"
    )
    assert_close(result.latents, wanted)


def test_guidance_rescale(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair("sd2")
    use(theirs, "ddim")
    wanted = theirs(
        PROMPT, num_inference_steps=4, guidance_scale=7.0, guidance_rescale=0.7, latents=noise(), output_type="latent"
    ).images
    result = ours.text_to_image(
        PROMPT,
        steps=4,
        guidance_scale=7.0,
        guidance_rescale=0.7,
        sampler="ddim",
        schedule="leading",
        width=64,
        height=64,
        latents=noise(),
        output="latent",
    )
    assert_close(result.latents, wanted)


def test_a_model_keeps_its_checkpoints_defaults(pair: Callable[[str], Pair], tmp_path: Any) -> None:
    theirs = oracles.pipeline("sd1", tmp_path)
    theirs.save_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    ours = fewstep.load(tmp_path / "model", device="cpu")
    wanted = theirs(PROMPT, num_inference_steps=5, generator=generators(1), height=64, width=64).images[0]
    assert_same_picture(ours.text_to_image(PROMPT, steps=5, seed=1, width=64, height=64).images[0], wanted)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_a_file_that_names_no_spacing_leaves_it_to_the_sampler(tmp_path: Any, sampler: str) -> None:
    theirs = oracles.pipeline("sd1", tmp_path)
    theirs.save_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    published = {key: value for key, value in json.loads(config.read_text()).items() if key != "timestep_spacing"}
    config.write_text(json.dumps(published | PUBLISHED))
    theirs.scheduler = SCHEDULERS[sampler].from_config(published | PUBLISHED)
    common = {"latents": noise(), "height": 64, "width": 64, "guidance_scale": 3.0}
    wanted = theirs(PROMPT, num_inference_steps=3, **common, output_type="latent").images
    ours = fewstep.load(tmp_path / "model", device="cpu")
    result = ours.text_to_image(PROMPT, steps=3, sampler=sampler, **common, output="latent")
    assert_close(result.latents, wanted)
    assert result.settings["schedule"] == ("leading" if sampler == "ddim" else "linspace")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc", "ddim"])
def test_image_to_image_leaves_the_spacing_to_the_sampler_too(pair: Callable[[str], Pair], sampler: str) -> None:
    theirs, ours = pair("sd1")
    own = {key: value for key, value in theirs.scheduler.config.items() if key != "timestep_spacing"}
    task = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(theirs)
    task.scheduler = SCHEDULERS[sampler].from_config(own | PUBLISHED)
    task.set_progress_bar_config(disable=True)
    common = {"strength": 0.6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    wanted = task(
        PROMPT, image=picture(), num_inference_steps=7, generator=generators(11), **common, output_type="latent"
    ).images
    spec = replace(ours.spec, scheduler=replace(ours.spec.scheduler, spacing=None))
    result = Pipeline(spec, ours.tokenizers, ours.engine).image_to_image(
        PROMPT, picture(), steps=7, seed=11, sampler=sampler, **common, output="latent"
    )
    assert_close(result.latents, wanted)


@pytest.mark.parametrize(
    ("kind", "refiner"), [("sdxl", "sd1"), ("sdxl", "sd2"), ("sdxl", "inpaint"), ("sd1", "refiner"), ("sd1", "inpaint")]
)
def test_a_model_that_cannot_refine_is_refused(pair: Callable[[str], Pair], kind: str, refiner: str) -> None:
    ours, other = pair(kind)[1], pair(refiner)[1]
    with pytest.raises(fewstep.InputError, match="expected two SDXL models"):
        ours.start(PROMPT, refiner=other)


def test_a_refiner_of_other_latents_is_refused(pair: Callable[[str], Pair]) -> None:
    ours, other = pair("sdxl")[1], pair("refiner")[1]
    spec = replace(other.spec, autoencoder=replace(other.spec.autoencoder, scaling_factor=0.2))
    with pytest.raises(fewstep.InputError, match=r"scaled by 0\.13025 and 0\.2"):
        ours.start(PROMPT, refiner=Pipeline(spec, other.tokenizers, other.engine))


def test_another_base_refines_as_in_diffusers(pair: Callable[[str], Pair]) -> None:
    theirs, ours = pair("sdxl")
    use(theirs, "euler")
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(theirs)
    second.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 10, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    latents = theirs(
        PROMPT, **common, height=64, width=64, latents=noise(), denoising_end=0.5, output_type="latent"
    ).images
    wanted = second(PROMPT, **common, image=latents, denoising_start=0.5, output_type="latent").images
    result = ours.text_to_image(
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=10,
        guidance_scale=4.0,
        sampler="euler",
        schedule="leading",
        width=64,
        height=64,
        latents=noise(),
        refiner=ours,
        handoff=0.5,
        output="latent",
    )
    assert_close(result.latents, wanted)


@pytest.mark.parametrize("name", ["LMSDiscrete", "DEISMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_a_sampler_that_stands_in_for_another_is_said(tmp_path: Any, name: str) -> None:
    theirs = oracles.pipeline("sd1", tmp_path)
    theirs.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(theirs.scheduler.config)
    theirs.save_pretrained(tmp_path / "model")
    ours = fewstep.load(tmp_path / "model", device="cpu")
    options = {"steps": 2, "width": 64, "height": 64, "seed": 1, "output": "latent"}
    sampler = ours.spec.scheduler.sampler
    assert ours.text_to_image(PROMPT, **options).notes == (
        f"{name}Scheduler is not implemented; {sampler} stands in for it",
    )
    assert ours.text_to_image(PROMPT, sampler="ddim", **options).notes == ()


def test_old_files_are_put_right_as_diffusers_pipelines_do(tmp_path: Any) -> None:
    theirs = oracles.pipeline("sd1", tmp_path)
    theirs.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    old = {**oracles.SD_NOISE, "_class_name": "DDIMScheduler"}  # diffusers' class would clip, and start from step 0
    config.write_text(json.dumps(old))
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    common = {"latents": noise(), "height": 64, "width": 64, "guidance_scale": 3.0}
    wanted = theirs(PROMPT, num_inference_steps=5, **common, output_type="latent").images
    result = fewstep.load(tmp_path / "model", device="cpu").text_to_image(PROMPT, steps=5, **common, output="latent")
    assert_close(result.latents, wanted)
