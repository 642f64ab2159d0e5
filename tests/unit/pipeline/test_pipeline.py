"""What a user of a pipeline relies on, whatever the weights: random tiny ones here."""

from __future__ import annotations

import copy
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep import InputError, NotFiniteError, Pipeline, Progress
from fewstep.engines.device import choose_device, choose_dtype
from fewstep.engines.eager import EagerEngine
from fewstep.images import read_metadata
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults
from fewstep.text.tokenizer import word_tokenizer
from fewstep.weights.model import LoadedModel
from fewstep.weights.scheduler import SchedulerConfig

WORDS = ["a", "red", "cube", "on", "top", "of", "blue", "sphere", ","]
PROMPT = "a red cube on top of a blue sphere"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    torch.manual_seed(1)
    tokenizer = word_tokenizer(WORDS, 12)
    text = TextConfig(vocabulary=16, window=12, width=16, layers=2, heads=2, inner=32, eos=tokenizer.eos)
    stages = (Stage(channels=16, resnets=1, depth=1, heads=2), Stage(channels=32, resnets=1, depth=1, heads=2))
    model = LoadedModel.of(
        Networks(
            unet=UNet(UNetConfig(stages=stages, context=16, groups=8)).eval(),
            autoencoder=AutoencoderKL(AutoencoderConfig(channels=(8, 8, 16, 16), resnets=1, groups=4)).eval(),
            text_encoders=(TextEncoder(text).eval(),),
        ),
        (tokenizer,),
        name="tiny",
        family="sd1",
        scheduler=SchedulerConfig(),
        defaults=Defaults(steps=4, guidance_scale=3.0, sampler="ddim", schedule="leading", width=64, height=64),
        licence="Apache-2.0",
    )
    return Pipeline.of(model)


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
    assert (result[..., 4:] - mean[..., 4:]).abs().max() < 6 * pipe.spec.autoencoder.scaling_factor
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
        ({"steps": float("nan")}, "steps nan is not a whole number"),
        ({"width": float("inf")}, "width inf is not a whole number from 64 to 8192; the nearest is 8192"),
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
    engine = Broken(pipe.spec, pipe.networks)
    engine.stage = stage
    with pytest.raises(NotFiniteError, match=named):
        Pipeline(pipe.spec, pipe.tokenizers, engine).text_to_image(PROMPT, seed=1)


def test_an_overflowing_half_precision_decoder_is_run_again_in_float32(pipe: Pipeline) -> None:
    vae = AutoencoderKL(replace(pipe.spec.autoencoder, force_upcast=False)).eval()
    vae.load_state_dict(pipe.networks.autoencoder.state_dict())
    with torch.no_grad():  # values near 1e5 after the first convolution: infinite in float16
        vae.post_quant_conv.weight.mul_(1e5)
        latents = torch.randn(1, 4, 8, 8)
        spec, networks = replace(pipe.spec, autoencoder=vae.config), replace(pipe.networks, autoencoder=vae)
        wanted = EagerEngine(spec, networks).decode(latents)
        vae.half()
        half = EagerEngine(spec, networks)
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


# what a result is to its user


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp"])
def test_a_saved_picture_says_how_it_was_made(pipe: Pipeline, tmp_path: Path, ending: str) -> None:
    result = pipe.text_to_image(PROMPT, seed=7, steps=2)
    assert result.save(tmp_path / f"cube{ending}") == [tmp_path / f"cube{ending}"]
    found = read_metadata(tmp_path / f"cube{ending}")
    assert found is not None
    assert (found["prompt"], found["seed"], found["steps"], found["model"]) == (PROMPT, 7, 2, "tiny")
    with Image.open(tmp_path / f"cube{ending}") as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(ending, "JPEG")


def test_several_pictures_are_numbered(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe.text_to_image(PROMPT, seed=7, images_per_prompt=2)
    written = result.save(str(tmp_path / "cube.png"))
    assert [path.name for path in written] == ["cube-1.png", "cube-2.png"]
    assert [read_metadata(path)["seed"] for path in written] == [7, 8]  # type: ignore[index]


def test_what_cannot_be_saved_is_told(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png, \.jpg"):
        pipe.text_to_image(PROMPT).save(tmp_path / "cube.gif")
    with pytest.raises(InputError, match="no picture"):
        pipe.text_to_image(PROMPT, output="latent").save(tmp_path / "cube.png")
    with pytest.raises(InputError, match="no folder"):
        pipe.text_to_image(PROMPT).save(tmp_path / "nowhere" / "cube.png")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_pictures_and_models(pipe: Pipeline) -> None:
    result = pipe.text_to_image(["<b>red</b>", "a cube"], seed=7)
    png = result._repr_png_()
    assert png is not None
    assert Image.open(BytesIO(png)).size == (128, 64)
    html = result._repr_html_()
    assert html is not None
    assert "&lt;b&gt;red" in html
    assert "<b>red" not in html
    assert "Apache-2.0" in pipe._repr_html_()
    assert pipe.text_to_image(PROMPT, output="latent")._repr_png_() is None


def test_a_bar_is_shown_when_asked_for(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.text_to_image(PROMPT, steps=2)
    assert capsys.readouterr().out == ""
    pipe.text_to_image(PROMPT, steps=2, progress=True)
    assert "drawing" in capsys.readouterr().out


def test_numbers_of_numpy_are_numbers(pipe: Pipeline) -> None:
    settings = {"steps": np.int64(2), "guidance_scale": np.float32(2.0), "width": np.int32(64), "seed": np.int64(5)}
    assert np.array_equal(
        pixels(pipe.text_to_image(PROMPT, **settings))[0],
        pixels(pipe.text_to_image(PROMPT, steps=2, guidance_scale=2.0, width=64, seed=5))[0],
    )


def test_noise_may_be_an_array(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).normal(size=(1, 4, 8, 8))
    given = pipe.text_to_image(PROMPT, latents=noise, output="latent").latents
    assert given is not None
    assert torch.equal(given, pipe.text_to_image(PROMPT, latents=torch.tensor(noise).float(), output="latent").latents)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda pipe: pipe.text_to_image(None), "prompt None is not a text"),
        (lambda pipe: pipe.text_to_image(5), "prompt 5 is not a text"),
        (lambda pipe: pipe.image_to_image(PROMPT, None), "image is None"),
        (lambda pipe: pipe.inpaint(PROMPT, Image.new("RGB", (64, 64)), None), "mask is None"),
        (lambda pipe: pipe.start(PROMPT, mask=Image.new("L", (64, 64))), "a mask needs a picture"),
        (lambda pipe: pipe.text_to_image(PROMPT, latents="noise"), "latents are a str"),
        (lambda pipe: pipe.text_to_image(PROMPT, num_inference_steps=5), "num_inference_steps is called steps here"),
        (lambda pipe: pipe.text_to_image(PROMPT, sampler="eular"), "did you mean 'euler'"),
    ],
)
def test_what_is_no_value_gets_an_error_of_ours(pipe: Pipeline, call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(pipe)


@pytest.mark.parametrize(
    ("name", "sampler", "schedule"),
    [
        ("euler_a", "euler_ancestral", "leading"),
        ("Euler a", "euler_ancestral", "leading"),
        ("k_euler", "euler", "leading"),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM++ SDE", "dpmpp_sde", "leading"),
        ("sample_dpmpp_2m", "dpmpp_2m", "leading"),
        ("EulerDiscreteScheduler", "euler", "leading"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral", "leading"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", "leading"),
        ("UniPC", "unipc", "leading"),
        ("LCM", "lcm", "leading"),
        ("DDIM", "ddim", "leading"),
    ],
)
def test_samplers_go_by_the_names_that_people_type(pipe: Pipeline, name: str, sampler: str, schedule: str) -> None:
    settings = pipe.text_to_image(PROMPT, sampler=name, steps=2, output="latent").settings
    assert (settings["sampler"], settings["schedule"]) == (sampler, schedule)


def test_a_photo_is_drawn_at_the_models_size_in_its_own_shape(pipe: Pipeline, tmp_path: Path) -> None:
    photo = Image.new("RGB", (403, 302), "green")
    photo.save(tmp_path / "photo.jpg")
    for image in (photo, tmp_path / "photo.jpg", np.asarray(photo), [photo]):
        result = pipe.image_to_image(PROMPT, image, strength=0.5)
        assert result.images[0].size == (72, 64)
        assert "72x64" in result.notes[0]
    mask = Image.new("L", photo.size, "white")
    assert pipe.inpaint(PROMPT, photo, mask).images[0].size == (72, 64)
    asked = pipe.image_to_image(PROMPT, photo, strength=0.5, width=128, height=96)
    assert (asked.images[0].size, asked.notes) == ((128, 96), ())
    near = pipe.image_to_image(PROMPT, Image.new("RGB", (80, 88)), strength=0.5)
    assert (near.images[0].size, near.notes) == ((80, 88), ())


def test_a_negative_prompt_without_guidance_is_told(pipe: Pipeline) -> None:
    assert "no effect" in pipe.text_to_image(PROMPT, negative_prompt="blue", guidance_scale=1.0).notes[0]
    assert pipe.text_to_image(PROMPT, negative_prompt="blue").notes == ()
    assert pipe.text_to_image(PROMPT, negative_prompt="", guidance_scale=1.0).notes == ()


def test_a_model_moves_and_takes_the_engine_that_is_best_there(pipe: Pipeline) -> None:
    moved = Pipeline.of(LoadedModel(pipe.spec, pipe.tokenizers, copy.deepcopy(pipe.networks)))
    wanted, engine = pixels(moved.text_to_image(PROMPT, seed=1))[0], moved.engine
    assert moved.to("cpu", "float16") is moved
    assert moved.engine is not engine
    assert moved.networks.unet.conv_in.weight.dtype == torch.float16
    assert np.abs(pixels(moved.text_to_image(PROMPT, seed=1))[0] - wanted).max() <= 8
    with pytest.raises(InputError, match=r"not available|unknown device"):
        moved.to("cuda:77")


def test_the_old_name_of_what_a_pipeline_holds_names_the_new_ones(pipe: Pipeline) -> None:
    with pytest.raises(AttributeError, match=r"pipe\.spec .*, pipe\.networks and pipe\.tokenizers"):
        _ = pipe.parts
