"""What a user of a pipeline relies on, whatever the weights: random tiny ones here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep import InputError, NotFiniteError, Pipeline, Progress
from fewstep.engines.device import choose_device, choose_dtype
from fewstep.engines.eager import EagerEngine
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults
from fewstep.text.tokenizer import word_tokenizer
from fewstep.weights.parts import Parts
from fewstep.weights.scheduler import SchedulerConfig

WORDS = ["a", "red", "cube", "on", "top", "of", "blue", "sphere", ","]
PROMPT = "a red cube on top of a blue sphere"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    torch.manual_seed(1)
    tokenizer = word_tokenizer(WORDS, 12)
    text = TextConfig(vocabulary=16, window=12, width=16, layers=2, heads=2, inner=32, eos=tokenizer.eos)
    stages = (Stage(channels=16, resnets=1, depth=1, heads=2), Stage(channels=32, resnets=1, depth=1, heads=2))
    parts = Parts(
        name="tiny",
        family="sd1",
        unet=UNet(UNetConfig(stages=stages, context=16, groups=8)).eval(),
        autoencoder=AutoencoderKL(AutoencoderConfig(channels=(8, 8, 16, 16), resnets=1, groups=4)).eval(),
        text_encoders=(TextEncoder(text).eval(),),
        tokenizers=(tokenizer,),
        scheduler=SchedulerConfig(),
        defaults=Defaults(steps=4, guidance_scale=3.0, sampler="ddim", schedule="leading", width=64, height=64),
        licence="Apache-2.0",
    )
    return Pipeline(parts)


def pixels(result: Any) -> list[np.ndarray]:
    return [np.asarray(image, np.int16) for image in result.images]


@pytest.mark.parametrize("sampler", sorted(fewstep.SAMPLERS))
def test_a_picture_depends_on_its_seed_alone(pipe: Pipeline, sampler: str) -> None:
    """Neither the batch nor the place in it changes a picture."""
    alone = pixels(pipe.text_to_image(PROMPT, seed=7, sampler=sampler))[0]
    batch = pixels(pipe.text_to_image(PROMPT, seed=[5, 6, 7, 8], images_per_prompt=4, sampler=sampler))
    prompts = ["a blue sphere", PROMPT]
    mixed = pixels(pipe.text_to_image(prompts, seed=[1, 7], sampler=sampler))
    assert abs(alone - batch[2]).max() <= 1
    assert abs(alone - mixed[1]).max() <= 1
    assert abs(batch[1] - batch[2]).max() > 1


def test_the_result_tells_how_it_was_made(pipe: Pipeline) -> None:
    result = pipe.text_to_image(PROMPT + " nonsense", seed=3, steps=2, width=72, height=80)
    assert result.images[0].size == (72, 80)
    assert result.seeds == (3,)
    assert result.tokens_used == (10,)
    assert result.tokens_dropped == (0,)
    assert result.unknown_words == ("nonsense",)
    assert set(result.seconds) == {"text", "encode", "denoise", "decode"}
    again = {k: v for k, v in result.settings.items() if k not in ("task", "model", "prompt")}
    assert pixels(pipe.text_to_image(result.settings["prompt"], seed=3, **again))[0].tolist() == (
        pixels(result)[0].tolist()
    )


def test_long_prompts_are_read_in_pieces_or_counted_as_cut(pipe: Pipeline) -> None:
    long = ", ".join([PROMPT] * 3)
    whole = pipe.text_to_image(long, seed=1, output="latent")
    assert whole.chunks == 3
    assert whole.tokens_dropped == (0,)
    cut = pipe.text_to_image(long, seed=1, output="latent", chunk=False)
    assert cut.chunks == 1
    assert cut.tokens_dropped == (whole.tokens_used[0] - 10,)
    assert not torch.equal(whole.latents, cut.latents)


def test_outputs(pipe: Pipeline) -> None:
    latent = pipe.text_to_image(PROMPT, seed=1, output="latent")
    array = pipe.text_to_image(PROMPT, seed=1, output="numpy").array
    picture = pipe.text_to_image(PROMPT, seed=1).images[0]
    assert latent.latents.shape == (1, 4, 8, 8)
    assert latent.images == ()
    assert array.shape == (1, 64, 64, 3)
    assert np.abs(array[0] * 255 - np.asarray(picture)).max() <= 0.51
    assert np.array_equal(np.asarray(pipe.decode(latent.latents)[0]), np.asarray(picture))


def test_steps_are_reported_and_a_run_can_be_left(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe.text_to_image(PROMPT, seed=1, steps=3, on_step=seen.append)
    assert [(p.index, p.total) for p in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[0].sigma > seen[1].sigma > seen[2].sigma
    assert seen[0].x0.shape == (1, 4, 8, 8)
    run = pipe.start(PROMPT, seed=1, steps=3)
    assert next(iter(run)).index == 0
    with pytest.raises(InputError, match="was left before its last step"):
        run.result()


def test_guidance_of_one_asks_the_network_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    engine = pipe.engine
    predict = engine.predict
    monkeypatch.setattr(engine, "predict", lambda x, t, c: rows.append(len(x)) or predict(x, t, c))
    pipe.text_to_image(PROMPT, seed=1, steps=2, guidance_scale=1.0)
    pipe.text_to_image(PROMPT, seed=1, steps=2, guidance_scale=2.0)
    assert rows == [1, 1, 2, 2]


def test_latents_replace_the_seeds_noise(pipe: Pipeline) -> None:
    noise = torch.randn(1, 4, 8, 8)
    a = pipe.text_to_image(PROMPT, seed=1, latents=noise, output="latent").latents
    b = pipe.text_to_image(PROMPT, seed=2, latents=noise, output="latent").latents
    assert torch.equal(a, b)
    with pytest.raises(InputError, match=r"latents have shape \(1, 4, 4, 4\); \(1, 4, 8, 8\) is needed"):
        pipe.text_to_image(PROMPT, latents=torch.randn(1, 4, 4, 4))


def test_inpainting_keeps_what_is_not_masked(pipe: Pipeline) -> None:
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    known = pipe.image_to_image(PROMPT, image, strength=1.0, seed=4, steps=1, output="latent")
    result = pipe.inpaint(PROMPT, image, mask, seed=4, output="latent").latents
    mean, _ = pipe.engine.encode(image)
    assert (result[..., 4:] - mean[..., 4:]).abs().max() < 6 * pipe.parts.autoencoder.config.scaling_factor
    assert not torch.equal(result[..., :4], known.latents[..., :4])


def test_latents_pass_from_task_to_task(pipe: Pipeline) -> None:
    latents = pipe.text_to_image(PROMPT, seed=1, output="latent").latents
    again = pipe.image_to_image(PROMPT, latents, strength=0.5, seed=1)
    assert again.images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 500}, "width 500 is not a multiple of 8; the nearest are 496 and 504"),
        ({"height": 0}, "height 0 is not a whole number from 64 to 8192; the nearest is 64"),
        ({"steps": 0}, "steps 0 is not a whole number from 1 to 1000; the nearest is 1"),
        ({"steps": 2.5}, "steps 2.5 is not a whole number"),
        ({"sampler": "eulr"}, "unknown sampler 'eulr'; did you mean 'euler'"),
        ({"schedule": "karas"}, "unknown schedule 'karas'; did you mean 'karras'"),
        ({"guidance_scale": -1}, "guidance_scale -1 is not a number from 0 to 100; the nearest is 0"),
        ({"seed": -3}, "seed -3 is not an integer"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"output": "jpeg"}, "unknown output 'jpeg'"),
        ({"images_per_prompt": 0}, "images_per_prompt 0"),
        ({"guidence_scale": 3}, "unknown option 'guidence_scale'; did you mean 'guidance_scale'"),
        ({"eta": 0.5, "sampler": "dpmpp_2m"}, "eta 0.5 means nothing to this sampler"),
    ],
)
def test_bad_values_are_explained(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pipe.text_to_image(PROMPT, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "strength", "message"),
    [
        (4, 0.2, "the smallest strength that runs one is 0.25"),
        (3, 0.3, "the smallest strength that runs one is 0.334"),
        (4, 1.5, "strength 1.5 is not a number from 0 to 1; the nearest is 1"),
    ],
)
def test_strengths_that_run_nothing(pipe: Pipeline, steps: int, strength: float, message: str) -> None:
    with pytest.raises(InputError) as caught:
        pipe.image_to_image(PROMPT, Image.new("RGB", (64, 64)), steps=steps, strength=strength)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "strength", "runs"), [(4, 0.25, 1), (3, 0.334, 1), (100, 0.29, 28), (2, 0.5, 1), (50, 1.0, 50)]
)
def test_strength_runs_that_share_of_the_steps(pipe: Pipeline, steps: int, strength: float, runs: int) -> None:
    assert len(pipe.start(PROMPT, image=Image.new("RGB", (64, 64)), steps=steps, strength=strength)) == runs


class Broken(EagerEngine):
    """An engine one stage of which gives NaN."""

    stage = ""

    def encode_text(self, ids: Any) -> Any:
        context, pooled = super().encode_text(ids)
        return context * (float("nan") if self.stage == "text" else 1), pooled

    def predict(self, *arguments: Any) -> Any:
        return super().predict(*arguments) * (float("inf") if self.stage == "denoise" else 1)

    def decode(self, latents: Any) -> Any:
        return super().decode(latents) * (float("nan") if self.stage == "decode" else 1)


@pytest.mark.parametrize(
    ("stage", "named"), [("text", "the text encoder"), ("denoise", "the denoising steps"), ("decode", "the decoder")]
)
def test_nan_names_its_stage(pipe: Pipeline, stage: str, named: str) -> None:
    engine = Broken(pipe.parts)
    engine.stage = stage
    with pytest.raises(NotFiniteError, match=named):
        Pipeline(pipe.parts, engine).text_to_image(PROMPT, seed=1)


def test_an_overflowing_half_precision_decoder_is_run_again_in_float32(pipe: Pipeline) -> None:
    vae = AutoencoderKL(replace(pipe.parts.autoencoder.config, force_upcast=False)).eval()
    vae.load_state_dict(pipe.parts.autoencoder.state_dict())
    with torch.no_grad():  # values near 1e5 after the first convolution: infinite in float16
        vae.post_quant_conv.weight.mul_(1e5)
        latents = torch.randn(1, 4, 8, 8)
        wanted = EagerEngine(replace(pipe.parts, autoencoder=vae)).decode(latents)
        half = EagerEngine(replace(pipe.parts, autoencoder=vae.half()))
        half.dtype = torch.float16
        assert not vae.decode(latents.half() / vae.config.scaling_factor).isfinite().all()
        image = half.decode(latents)
    assert image.isfinite().all()
    assert (image - wanted).abs().max() / wanted.abs().max() < 1e-2
    assert next(vae.parameters()).dtype == torch.float16


def test_devices_and_number_formats() -> None:
    cpu = choose_device("cpu")
    assert choose_dtype(None, cpu) == torch.float32
    assert choose_dtype("float32", cpu) == torch.float32
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        choose_device("gpu")
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        choose_dtype("int8", cpu)


def test_a_cpu_is_not_made_to_emulate_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16  # for weights alone, see the engine for CPUs
    with pytest.raises(InputError, match="emulates bfloat16"):
        choose_dtype("bfloat16", torch.device("cpu"))
