from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fewstep.blockworld import COLOURS, RELATIONS, SHAPES, SIZES, SPLITS, Scenes, captions, render, scenes
from fewstep.blockworld.detector import UNREADABLE, BlockReader, SceneReading, hues
from fewstep.blockworld.grading import grade
from fewstep.blockworld.scene import ALONE, LEFT, ON_TOP, RGB
from fewstep.errors import InputError


@pytest.fixture(scope="module")
def reader() -> BlockReader:
    return BlockReader(64)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """A 3 x 3 Gaussian, as soft as a small autoencoder."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def said(batch: Scenes) -> list[str]:
    return captions(batch, seed=0, style="canonical")


def pair(first: str, relation: str, second: str) -> Scenes:
    """One scene of two large objects, "red cube", "left of", "blue sphere"."""
    relations = torch.tensor([RELATIONS.index(relation)])
    batch = scenes(64, seed=0, single=0.0)
    batch = batch[batch.relation == relations][:1]
    words = [name.split() for name in (first, second)]
    return replace(
        batch,
        colour=torch.tensor([[COLOURS.index(c) for c, _ in words]]),
        shape=torch.tensor([[SHAPES.index(s) for _, s in words]]),
        size=torch.tensor([[1, 1]]),
    )


@pytest.mark.parametrize("single", [0.0, 1.0])
@pytest.mark.parametrize("split", SPLITS)
def test_clean_pictures_are_read_right(reader, split, single):
    batch = scenes(100, seed=21, split=split, single=single)
    assert grade(reader.read(render(batch, 64)), batch, said(batch)).exact >= 0.99


@pytest.mark.parametrize("single", [0.0, 1.0])
def test_soft_and_noisy_pictures_are_read_right(reader, single):
    batch = scenes(100, seed=22, single=single)
    noise = 0.03 * torch.randn(100, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    readings = reader.read(blurred(render(batch, 64)) + noise)
    assert grade(readings, batch, said(batch)).exact >= 0.97
    sizes = [f"a {SIZES[z]} {COLOURS[c]} thing" for z, c in zip(batch.size[:, 0], batch.colour[:, 0], strict=True)]
    assert grade(readings, batch, sizes).size >= 0.95


def test_larger_pictures_are_read_too():
    batch = scenes(30, seed=23)
    assert grade(BlockReader(128).read(render(batch, 128)), batch, said(batch)).exact >= 0.96


def test_the_wrong_pictures_are_wrong(reader):
    """A reader that nodded everything through would be worthless."""
    batch = scenes(60, seed=24)
    shuffled = grade(reader.read(render(batch, 64).roll(1, 0)), batch, said(batch))
    assert shuffled.exact <= 0.02


def test_an_empty_stage_and_noise_show_nothing_that_was_asked_for(reader):
    batch = scenes(4, seed=0)
    grey = reader.read(torch.zeros(4, 3, 64, 64))
    assert [reading.count for reading in grey] == [0] * 4
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert grade(reader.read(noise), batch, said(batch)).exact == 0


def test_a_mirrored_picture_has_the_mirrored_relation(reader):
    pictures = render(pair("red cube", "left of", "blue sphere"), 64)
    plain, mirrored = reader.read(torch.cat([pictures, pictures.flip(-1)]))
    assert plain.relation == mirrored.relation == LEFT
    assert plain.colours == mirrored.colours[::-1] == (0, 5)


def test_right_of_is_read_as_left_of_and_graded_as_asked(reader):
    batch = pair("green cylinder", "right of", "pink torus")
    readings = reader.read(render(batch, 64))
    assert readings[0].relation == LEFT
    assert readings[0].colours == (COLOURS.index("pink"), COLOURS.index("green"))
    assert grade(readings, batch, said(batch)).direction == 1


def test_two_objects_of_one_colour_are_not_one_object(reader):
    batch = pair("red cube", "left of", "red sphere")
    assert reader.read(render(batch, 64))[0].count == 2


def test_a_blob_has_no_shape(reader):
    picture = torch.full((1, 3, 64, 64), 0.4)
    picture[:, :, 10:14, 4:60] = RGB[0][:, None, None] * 2 - 1
    reading = reader.read(picture)[0]
    assert reading.colours == (0,)
    assert reading.shapes == (UNREADABLE,)


def test_hues_of_the_palette_are_apart():
    palette = hues(RGB[:, :, None, None]).flatten()
    gaps = (palette[:, None] - palette + 180) % 360 - 180
    assert gaps.abs().fill_diagonal_(360).min() > 25


def test_pictures_of_another_size_are_refused(reader):
    with pytest.raises(InputError, match="64, 64"):
        reader.read(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="16"):
        BlockReader(16)


# ---- grading ----

RED, BLUE, CUBE, SPHERE = 0, 5, 0, 1
WANTED = SceneReading(count=2, colours=(RED, BLUE), shapes=(CUBE, SPHERE), sizes=(1, 1), relation=ON_TOP, fit=1.0)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (
            {},
            {"count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind", "direction", "exact"},
        ),
        (
            {"shapes": (SPHERE, CUBE)},
            {"count", "colours", "shapes_bag", "size", "relation_kind", "direction"},
        ),
        (
            {"colours": (BLUE, RED), "shapes": (SPHERE, CUBE)},
            {"count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind"},
        ),
        ({"relation": ALONE}, {"count", "colours", "shapes_bag", "shapes_bound", "size"}),
        ({"count": 3}, set()),
        ({"colours": (RED, RED + 1)}, {"count"}),
        (
            {"sizes": (0, 1)},
            {"count", "colours", "shapes_bag", "shapes_bound", "relation_kind", "direction"},
        ),
    ],
)
def test_each_mistake_costs_its_own_marks(change, passed):
    batch = pair("red cube", "on top of", "blue sphere")
    grades = grade([replace(WANTED, **change)], batch, ["a large red cube on top of a big blue sphere"])
    names = ("count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind", "direction", "exact")
    assert {name for name in names if getattr(grades, name) == 1} == passed
    assert grades.images == (grades.exact == 1,)


@pytest.mark.parametrize(
    ("prompt", "right"),
    [
        ("a red cube on top of a blue sphere", True),
        ("a red cube on top of a large blue sphere", True),
        ("a large red cube on top of a blue sphere", False),
        ("there is a blue sphere under a big red cube", False),
    ],
)
def test_only_the_sizes_that_a_prompt_says_are_graded(prompt, right):
    batch = pair("red cube", "on top of", "blue sphere")
    grades = grade([replace(WANTED, sizes=(0, 1))], batch, [prompt])
    assert (grades.size == 1) is (grades.exact == 1) is right


def test_readings_and_scenes_must_match_in_number():
    with pytest.raises(InputError, match="1 readings, 2 scenes"):
        grade([WANTED], scenes(2, seed=0), ["a red cube"] * 2)
