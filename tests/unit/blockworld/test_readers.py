"""The reader that learned: right on renders, wrong on wrong pictures, and of another kind than the algorithm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.blockworld import SPLITS, Scenes, captions, render, scenes
from fewstep.blockworld.grading import grade
from fewstep.blockworld.learned_detector import FindingNetwork, SecondReader
from fewstep.blockworld.scene import ALONE, LEFT
from fewstep.errors import CheckpointError, InputError
from fewstep.evaluate.blocks.composition import PROMPT_GROUPS, READERS, Examiner, questions, relative_accuracy
from fewstep.images import to_pil
from fewstep.weights.auxiliary import ASSETS, load_network, save_network


@pytest.fixture(scope="module")
def reader() -> SecondReader:
    return SecondReader()


def said(batch: Scenes) -> list[str]:
    return captions(batch, seed=0, style="canonical")


@pytest.mark.parametrize("single", [0.0, 1.0])
@pytest.mark.parametrize("split", SPLITS)
def test_fresh_renders_are_read_right(reader, split, single):
    batch = scenes(60, seed=31, split=split, single=single)
    assert grade(reader.read(render(batch, 64)), batch, said(batch)).exact >= 0.96


def test_larger_pictures_are_read_too(reader):
    batch = scenes(40, seed=32)
    assert grade(reader.read(render(batch, 128)), batch, said(batch)).exact >= 0.95


def test_the_wrong_pictures_are_wrong(reader):
    batch = scenes(60, seed=33)
    assert grade(reader.read(render(batch, 64).roll(1, 0)), batch, said(batch)).exact <= 0.02


def test_an_empty_stage_shows_nothing_and_noise_not_what_was_asked_for(reader):
    batch = scenes(20, seed=34)
    bare = render(replace(batch, count=torch.zeros_like(batch.count)), 64)
    assert [reading.count for reading in reader.read(bare)] == [0] * 20
    noise = torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert grade(reader.read(noise), batch, said(batch)).exact <= 0.05


def test_an_object_drawn_twice_is_counted_twice(reader):
    """What generators do wrong most often: no picture of the world shows it."""
    batch = scenes(100, seed=35, single=0.0)
    batch = batch[batch.relation == LEFT]
    twins = replace(batch, **{name: getattr(batch, name)[:, :1].repeat(1, 2) for name in ("colour", "shape", "size")})
    readings = reader.read(render(twins, 64))
    assert sum(reading.count == 2 and len(set(reading.colours)) == 1 for reading in readings) >= 0.9 * len(twins)


def test_a_single_object_stands_in_no_relation(reader):
    assert {reading.relation for reading in reader.read(render(scenes(30, seed=36, single=1.0), 64))} == {ALONE}


def test_a_mirrored_picture_has_the_mirrored_relation(reader):
    batch = scenes(60, seed=37, single=0.0)
    batch = batch[batch.relation == LEFT]
    plain, mirrored = (reader.read(pictures) for pictures in (render(batch, 64), render(batch, 64).flip(3)))
    turned = [a.colours == b.colours[::-1] and b.relation == LEFT for a, b in zip(plain, mirrored, strict=True)]
    assert sum(turned) >= 0.9 * len(turned)


def test_no_picture_depends_on_the_others(reader):
    """What is read is the same; how sure the reader is, is so up to the rounding of products in another batch."""
    pictures = render(scenes(5, seed=38), 64)
    together, alone = reader.read(pictures), [reader.read(picture[None])[0] for picture in pictures]
    assert [replace(reading, fit=0.0) for reading in together] == [replace(reading, fit=0.0) for reading in alone]
    assert [reading.fit for reading in together] == pytest.approx([reading.fit for reading in alone], abs=1e-5)


def test_what_is_no_square_picture_is_refused(reader):
    with pytest.raises(InputError, match=r"\(1, 3, 64, 96\)"):
        reader.read(torch.zeros(1, 3, 64, 96))


def test_the_reader_says_which_weights_it_has(reader):
    assert reader.network_id.name == "second-reader"
    assert len(reader.network_id.digest) == 16


def test_weights_of_another_network_are_refused(tmp_path):
    save_network(torch.nn.Linear(2, 3), tmp_path)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_network(tmp_path, FindingNetwork())


def test_shipped_networks_are_small():
    files = list(ASSETS.rglob("*.safetensors"))
    assert len(files) == 3
    assert max(path.stat().st_size for path in files) < 1_000_000


# the exam


def test_the_exam_asks_what_was_held_out():
    asked = {question.group: question for question in questions(8)}
    assert set(asked) == set(PROMPT_GROUPS)
    assert len(asked["two objects, held out"].prompts) == 8
    assert len(asked["two objects, trained on"].prompts) == 2
    assert all(" of a " in prompt or " of an " in prompt for prompt in asked["two objects, held out"].prompts)


def test_both_readers_find_renders_right_and_agree():
    question = questions(12)[1]
    answer = Examiner().grades(question, to_pil(render(question.target, 64)))
    assert [answer.grades[reader].exact for reader in READERS] == [1.0, 1.0]
    assert answer.agreement.value == 1
    assert answer.agreement.low < 0.8, "of 12 pictures little is known"
    assert relative_accuracy([answer], [answer]) == [1.0]


def test_both_readers_find_other_pictures_wrong():
    question = questions(12)[1]
    answer = Examiner().grades(question, to_pil(render(question.target, 64).roll(1, 0)))
    assert [answer.grades[reader].exact for reader in READERS] == [0.0, 0.0]
    assert relative_accuracy([answer], [answer]) == [None]


def test_an_exam_of_nothing_is_refused():
    with pytest.raises(InputError, match="exam of 0 prompts"):
        questions(0)
