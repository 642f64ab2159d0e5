"""Drawn images are kept and never mistaken for others; models are set up once; reports appear whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fewstep import tables as report
from fewstep.errors import InputError, NotFiniteError
from fewstep.evaluate.candidates import BATCH, Candidate, distinct_candidates, generate_images, load_candidates
from fewstep.evaluate.image_cache import ImageCache
from fewstep.metrics.intervals import Interval, format_interval


class Pipe:
    """Draws plain images whose colour says prompt, seed and steps; chokes on the prompt "nan"."""

    def __init__(self, name: str = "stub", weight: float = 1.0, steps: int = 10) -> None:
        network = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(network.weight, weight)
        torch.nn.init.zeros_(network.bias)
        defaults = SimpleNamespace(steps=steps)
        self.spec = SimpleNamespace(name=name, defaults=defaults)
        self.networks = SimpleNamespace(unet=network, autoencoder=network, text_encoders=())
        self.drawn: list[tuple[str, int]] = []

    def start(self, prompt, *, seed, **options):
        steps = options.get("steps", self.spec.defaults.steps)
        return SimpleNamespace(settings={"prompt": prompt, "steps": steps, "width": 8, "height": 8})

    def text_to_image(self, prompts, *, seed, **options):
        if "nan" in prompts:
            raise NotFiniteError("the decoder gave NaN or infinity")
        self.drawn += list(zip(prompts, seed, strict=True))
        steps = options.get("steps", self.spec.defaults.steps)
        images = [Image.new("RGB", (8, 8), (len(p), 100 + s, steps)) for p, s in zip(prompts, seed, strict=True)]
        return SimpleNamespace(images=images)


def test_a_picture_is_drawn_once(tmp_path):
    pipe = Pipe()
    first = ImageCache("stub", pipe, tmp_path).generate(["a", "bb"], [0, 1], {})
    again = ImageCache("stub", pipe, tmp_path).generate(["a", "bb", "ccc"], [0, 1, 2], {})
    assert pipe.drawn == [("a", 0), ("bb", 1), ("ccc", 2)]
    assert (first.generated, again.generated) == (2, 1)
    assert [image.getpixel((0, 0)) for image in again.images] == [(1, 100, 10), (2, 101, 10), (3, 102, 10)]


@pytest.mark.parametrize(
    ("pipe", "prompt", "seed", "options"),
    [
        (Pipe(weight=2.0), "a", 0, {}),
        (Pipe(), "b", 0, {}),
        (Pipe(), "a", 1, {}),
        (Pipe(), "a", 0, {"steps": 4}),
    ],
)
def test_other_weights_prompts_seeds_and_settings_are_other_images(tmp_path, pipe, prompt, seed, options):
    ImageCache("stub", Pipe(), tmp_path).generate(["a"], [0], {})
    assert ImageCache("stub", pipe, tmp_path).generate([prompt], [seed], options).generated == 1


def test_nan_gives_one_black_picture_and_spares_the_batch(tmp_path):
    pipe = Pipe()
    drawn = ImageCache("stub", pipe, tmp_path).generate(["a", "nan", "bb"], [0, 1, 2], {})
    assert drawn.black == 1
    assert [image.getpixel((0, 0))[0] for image in drawn.images] == [1, 0, 2]
    assert ImageCache("stub", pipe, tmp_path).generate(["nan"], [1], {}).black == 1, (
        "it is black again when it comes from the file"
    )


def test_an_interrupted_run_goes_on(tmp_path):
    pipe = Pipe()

    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ImageCache("stub", pipe, tmp_path, interrupted).generate(["a"] * 60, range(60), {})
    calls: list[tuple[int, int]] = []
    ImageCache("stub", pipe, tmp_path, lambda *done: calls.append(done)).generate(["a"] * 60, range(60), {})
    assert sorted(seed for _, seed in pipe.drawn) == list(range(60))
    assert calls[-1] == (60, 60)


# contestants


def load_cache(name, folder, made):
    made.append(name)
    return ImageCache(name, Pipe(name, steps=1 if "turbo" in name else 10), folder)


def labels(texts, tmp_path):
    made: list[str] = []
    return [one.label for one in load_candidates(texts, "base", lambda name: load_cache(name, tmp_path, made))], made


def test_models_are_set_up_once_and_the_base_comes_first(tmp_path):
    found, made = labels(["small", "small:steps=4", "base"], tmp_path)
    assert found == ["base, 10 steps", "small, 10 steps", "small, 4 steps"]
    assert made == ["base", "small"]


def test_a_turbo_model_brings_the_base_at_few_steps(tmp_path):
    found, _ = labels(["turbo"], tmp_path)
    assert found == ["base, 10 steps", "turbo, 1 step", "turbo, 4 steps", "base, 1 step", "base, 4 steps"]


def test_settings_are_heard_and_unknown_ones_refused(tmp_path):
    found, _ = labels(["small:steps=2,guidance_scale=1.5"], tmp_path)
    assert found[1] == "small, 2 steps, guidance_scale 1.5"
    with pytest.raises(InputError, match="did you mean 'steps'"):
        labels(["small:step=2"], tmp_path)
    with pytest.raises(InputError, match="'few' is not a number"):
        labels(["small:steps=few"], tmp_path)


# reports


def test_a_report_replaces_another_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.md"
    report.write_text(path, "one")
    report.write_text(path, "two")
    assert path.read_text() == "two"
    with pytest.raises(UnicodeEncodeError):
        report.write_text(path, "\ud800")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_tables_are_for_people_and_csv_for_programs():
    rows = [{"name": "a", "share": 0.98765, "many": 1234.5, "none": None}]
    assert report.table(rows).splitlines()[2] == "| a | 0.988 | 1234 |  |"
    assert report.csv_text(rows).splitlines() == ["name,share,many,none", "a,0.98765,1234.5,"]
    assert format_interval(Interval(0.5, 0.25, 0.75)) == "0.500 (0.250 to 0.750)"


# candidates of a comparison


def test_candidates_are_labelled_as_written_and_differ(tmp_path):
    (tmp_path / "mine").mkdir()
    one, two = distinct_candidates(["base:steps=2,width=64", f"{tmp_path / 'mine'}:eta=0.5"])
    assert one == ("base:steps=2,width=64", "base", {"steps": 2, "width": 64})
    assert two == ("mine:eta=0.5", str(tmp_path / "mine"), {"eta": 0.5})
    with pytest.raises(InputError, match="name two or more"):
        distinct_candidates(["base"])
    with pytest.raises(InputError, match="would be called 'base'"):
        distinct_candidates(["base", "base"])


def test_images_of_a_comparison_have_their_seeds_in_any_batch():
    pipe = SimpleNamespace(calls=[])

    def text_to_image(prompts, *, seed, on_step, **options):
        pipe.calls.append((tuple(prompts), tuple(seed), options))
        settings = {"prompt": prompts, "seed": seed, "model": "stub", "task": "t", "steps": 2}
        return SimpleNamespace(images=list(seed), settings=settings)

    pipe.text_to_image = text_to_image
    candidate = Candidate("stub", "stub", {"steps": 2})
    prompts = [f"p{i}" for i in range(BATCH + 1)]
    settings, images = generate_images(candidate, pipe, prompts, seed=7, on_step=lambda step: None)
    assert images == list(range(7, 7 + BATCH + 1))
    assert [len(batch) for batch, _, _ in pipe.calls] == [BATCH, 1]
    assert settings == {"model": "stub", "steps": 2}
