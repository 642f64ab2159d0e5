"""The Pareto chart: the right points, on the page and in the table."""

from __future__ import annotations

import csv
import sys
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from fewstep.errors import InputError, MissingExtraError
from fewstep.evaluate.image_cache import CachedImages
from fewstep.evaluate.pareto.chart import write_chart
from fewstep.evaluate.pareto.front import SCALES, Point, front, knee
from fewstep.evaluate.pareto.suite import GuidanceSweep, PromptSet, SweepSettings, prompt_set, write_pareto
from fewstep.evaluate.prompts import read_prompts
from fewstep.metrics.distances import Distances
from fewstep.metrics.features import Features
from fewstep.metrics.intervals import Estimate, Interval
from fewstep.weights.auxiliary import NetworkId

CARD = NetworkId(name="stub", digest="0" * 16)


def point(scale: float, clip: float, fid: float, **more: object) -> Point:
    found = Distances(fid=Interval(fid, fid - 1, fid + 2), limit=None, kid=Estimate(0.1, 0.01), count=50)
    return Point(scale=scale, clip=Estimate(clip, 0.5), distances=found, **more)


CURVE = [point(1.5, 20, 30), point(3, 25, 20), point(5, 27, 22), point(6, 26.5, 24), point(8, 28, 40)]


def test_the_front_leaves_out_what_is_beaten_in_both():
    assert [p.scale for p in front(CURVE)] == [3, 5, 8]


def test_the_knee_is_near_the_best_of_both():
    assert knee(CURVE).scale == 5
    assert knee([CURVE[0]]).scale == 1.5
    with pytest.raises(InputError, match="no points"):
        knee([])


def test_the_scales_are_those_of_the_card():
    assert SCALES == (1.5, 2, 3, 4, 5, 6, 7, 8)


def test_doubts_tell_of_few_and_black_images():
    assert point(3, 25, 30).warnings() == []
    few, black = point(3, 25, 4, black=2).warnings()
    assert "within 3 and 6, 3 wide" in few
    assert black == "guidance 3: 2 of 50 images are black or were not finite"


def test_the_chart_shows_each_scale_and_is_the_same_each_time(tmp_path):
    paths = [tmp_path / "pareto.svg", tmp_path / "pareto.png"]
    write_chart({"base": CURVE, "small": CURVE[:2]}, "50 PLMS steps", paths)
    first = paths[0].read_bytes()
    ElementTree.fromstring(first)
    for words in (
        b"50 PLMS steps",
        b"base",
        b"small",
        b"CLIP score",
        b"FID",
        *(b"%g" % scale for scale in (1.5, 3, 8)),
    ):
        assert words in first, words
    assert Image.open(paths[1]).size[0] > 600
    write_chart({"base": CURVE, "small": CURVE[:2]}, "50 PLMS steps", paths)
    assert paths[0].read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto.png", "pareto.svg"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"fewstep\[train\]"):
        write_chart({"base": CURVE}, "", [tmp_path / "a.svg"])


class StubClip:
    """Sees an image's grey value as an angle to its text."""

    network_id = CARD

    def images(self, images):
        angles = torch.tensor([image.getpixel((0, 0))[0] / 100 for image in images])
        return torch.stack([angles.cos(), angles.sin()], 1)

    def texts(self, prompts):
        return torch.tensor([[1.0, 0.0]] * len(prompts))


class StubCache:
    """Draws grey images, darker the higher the guidance."""

    name = "stub"

    def __init__(self):
        self.calls = []

    def generate(self, prompts, seeds, options):
        self.calls.append((options["guidance_scale"], options["steps"], options["sampler"], list(seeds)))
        grey = round(80 / options["guidance_scale"])
        images = tuple(Image.new("RGB", (8, 8), (grey + seed % 3,) * 3) for seed in seeds)
        return CachedImages(images=images, black=0, generated=len(seeds), seconds=1.0, settings={})


def test_measured_points_are_right_and_written_down(tmp_path):
    real = [Image.new("RGB", (8, 8), (40 + i % 3,) * 3) for i in range(30)]
    grey = Features(network_id=CARD, of=lambda own: torch.tensor([[float(p.getpixel((0, 0))[0])] for p in own]))
    prompts = PromptSet(prompts=["a"] * 12, real=real, description="greys")
    cache = StubCache()
    report = write_pareto(
        [cache], GuidanceSweep(prompts, SweepSettings(scales=(1.0, 2.0, 4.0)), StubClip(), grey), tmp_path
    )
    assert cache.calls == [(scale, 50, "plms", list(range(12))) for scale in (1.0, 2.0, 4.0)]
    rows = list(csv.DictReader((tmp_path / "pareto.csv").open()))
    assert [float(row["guidance"]) for row in rows] == [1, 2, 4]
    clips = [float(row["CLIP score"]) for row in rows]
    expected = [100 * sum(torch.tensor((g + i) / 100).cos().item() for i in range(3)) / 3 for g in (80, 40, 20)]
    assert clips == pytest.approx(expected, abs=1e-3)
    assert [float(row["FID"]) for row in rows] == pytest.approx([1600, 0, 400], rel=0.01, abs=0.1)
    text = report.read_text()
    assert "stub: guidance 2" in text
    assert str(CARD) in text
    assert (tmp_path / "pareto.svg").exists()


def test_prompts_and_pictures_of_the_users_own(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\na house\n")
    (tmp_path / "real").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "real" / "1.png")
    own = prompt_set(2, tmp_path / "prompts.txt", tmp_path / "real", side=64, renders=20)
    assert own.prompts == ["a dog", "a cat"]
    assert len(own.real) == 1
    with pytest.raises(InputError, match="holds 3 prompts for 5 images"):
        prompt_set(5, tmp_path / "prompts.txt", tmp_path / "real", side=64, renders=20)
    with pytest.raises(InputError, match="belong together"):
        prompt_set(2, tmp_path / "prompts.txt", None, side=64, renders=20)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red cube\na blue ball\n")
    assert read_prompts(tmp_path / "prompts.txt", 2) == ["a red cube", "a blue ball"]
