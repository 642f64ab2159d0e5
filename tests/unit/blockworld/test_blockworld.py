from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from fewstep.blockworld import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scenes,
    captions,
    keys,
    render,
    require_train,
    scenes,
    split_digest,
    split_of,
    vocabulary,
)
from fewstep.blockworld.layout import COS
from fewstep.blockworld.scene import HEIGHTS, LEFT, ON_TOP, RADII, RIGHT
from fewstep.blockworld.split import UNSEEN_ATOMS, all_keys, pair_key
from fewstep.errors import InputError


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Scenes))


def atoms(batch: Scenes) -> list[set[str]]:
    """The "colour shape" of the objects that each scene holds."""
    return [
        {f"{COLOURS[c]} {SHAPES[s]}" for c, s in zip(colour[:n], shape[:n], strict=True)}
        for n, colour, shape in zip(batch.count.tolist(), batch.colour.tolist(), batch.shape.tolist(), strict=True)
    ]


# ---- scenes ----


def test_scenes_are_a_function_of_their_arguments():
    assert same(scenes(50, seed=1), scenes(50, seed=1))
    assert not same(scenes(50, seed=1), scenes(50, seed=2))


def test_scenes_are_indexed_by_slices_indices_and_masks():
    batch = scenes(10, seed=0)
    assert len(batch) == 10
    assert same(batch[2:5], batch[torch.tensor([2, 3, 4])])
    assert len(batch[batch.count == 1]) == int((batch.count == 1).sum())


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_belongs_to_the_split_that_was_asked_for(split):
    batch = scenes(600, seed=3, split=split)
    assert {split_of(key) for key in keys(batch)} == {split}


@pytest.mark.parametrize(("single", "counts"), [(0.0, {2}), (1.0, {1})])
def test_the_share_of_single_objects(single, counts):
    assert set(scenes(100, seed=0, single=single).count.tolist()) == counts


def test_two_objects_differ_in_colour_and_one_object_has_an_empty_second_column():
    batch = scenes(2000, seed=5)
    pairs, singles = batch[batch.count == 2], batch[batch.count == 1]
    assert (pairs.colour[:, 0] != pairs.colour[:, 1]).all()
    assert (pairs.relation > 0).all()
    for name in ("shape", "colour", "size", "position"):
        assert (getattr(singles, name)[:, 1] == 0).all()
    assert (singles.relation == 0).all()


def test_attributes_are_drawn_evenly():
    batch = scenes(20000, seed=7, single=0.0)
    for values, kinds in ((batch.shape, SHAPES), (batch.colour, COLOURS), (batch.size, SIZES)):
        shares = torch.bincount(values.flatten(), minlength=len(kinds)) / values.numel() * len(kinds)
        assert shares.min() > 0.8
        assert shares.max() < 1.25
    shares = torch.bincount(batch.relation, minlength=5)[1:] / len(batch) * 4
    assert shares.min() > 0.9


def test_every_object_is_inside_the_picture():
    batch = scenes(4000, seed=9)
    top = batch.position[..., 1] + (batch.position[..., 2] + HEIGHTS[batch.shape] * RADII[batch.size]) * COS
    there = torch.arange(2) < batch.count[:, None]
    assert top[there].max() < 1
    assert batch.position[..., :2][there].abs().max() < 0.76


def test_what_is_left_is_left_and_what_is_on_top_is_above():
    batch = scenes(1000, seed=2, single=0.0)
    u, height = batch.position[..., 0], batch.position[..., 2]
    assert (u[batch.relation == LEFT, 0] < u[batch.relation == LEFT, 1]).all()
    assert (u[batch.relation == RIGHT, 0] > u[batch.relation == RIGHT, 1]).all()
    assert (height[batch.relation == ON_TOP, 0] > 0).all()


@pytest.mark.parametrize("wrong", [{"split": "held_out"}, {"single": 1.5}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(InputError, match=r"heldout|between 0 and 1"):
        scenes(1, seed=0, **wrong)


# ---- split ----


def test_the_keys_fall_into_three_disjoint_splits():
    everything = all_keys()
    assert len(set(everything)) == len(everything) == 96 + 48 * 42 * 3
    counts = {(split, "|" in key): 0 for split in SPLITS for key in ("a", "a|b")}
    for key in everything:
        counts[split_of(key), "|" in key] += 1
    assert counts == {
        ("train", False): 79,
        ("heldout", False): 9,
        ("unseen_atoms", False): 8,
        ("train", True): 4566,
        ("heldout", True): 510,
        ("unseen_atoms", True): 972,
    }


def test_the_split_is_the_same_everywhere():
    """Published weights carry this digest: a change makes their exam worthless."""
    assert split_digest() == "824b08fd35b5c4f6"
    assert split_of("red cube|on top of|blue sphere") == "heldout"


def test_the_split_does_not_depend_on_python_hash_seed():
    code = "from fewstep.blockworld import split_digest; print(split_digest())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout.strip() == split_digest()


def test_mirrored_relations_share_a_key():
    assert pair_key((0, 0), LEFT, (5, 1)) == pair_key((5, 1), RIGHT, (0, 0)) == "red cube|left of|blue sphere"


def test_training_never_shows_what_is_held_out():
    train = scenes(20000, seed=0)
    held = scenes(2000, seed=0, split="heldout")
    assert not set(keys(train)) & set(keys(held))
    assert not any(found & UNSEEN_ATOMS for found in atoms(train))
    assert not any(found & UNSEEN_ATOMS for found in atoms(held))
    sized = {
        f"{SIZES[z]} {COLOURS[c]} {SHAPES[s]}"
        for n, zs, cs, ss in zip(
            train.count.tolist(),
            train.size.tolist(),
            train.colour.tolist(),
            train.shape.tolist(),
            strict=True,
        )
        for z, c, s in list(zip(zs, cs, ss, strict=True))[:n]
    }
    assert {split_of(key) for key in sized} == {"train"}


@pytest.mark.parametrize("split", ["heldout", "unseen_atoms"])
def test_no_training_caption_is_an_exam_caption(split):
    train = scenes(20000, seed=0)
    said = {c for s in range(3) for c in captions(train, seed=s, style="varied")}
    said |= set(captions(train, seed=0, style="canonical"))
    asked = set(captions(scenes(4000, seed=0, split=split), seed=0, style="canonical"))
    assert not said & asked


def test_unseen_atoms_have_an_atom_that_training_lacks():
    assert all(found & UNSEEN_ATOMS for found in atoms(scenes(500, seed=0, split="unseen_atoms")))


def test_a_held_out_scene_in_training_raises():
    require_train(scenes(300, seed=0))
    leak = scenes(1, seed=0, split="heldout")
    with pytest.raises(InputError, match="must not be trained on") as error:
        require_train(leak)
    assert keys(leak)[0] in str(error.value)


# ---- captions ----


def hero(relation: str) -> Scenes:
    batch = scenes(1, seed=0, single=0.0)
    return replace(
        batch,
        colour=torch.tensor([[0, 1]]),
        shape=torch.tensor([[0, 3]]),
        size=torch.tensor([[0, 1]]),
        relation=torch.tensor([RELATIONS.index(relation)]),
    )


def test_canonical_captions():
    assert captions(hero("on top of"), seed=0, style="canonical") == ["a red cube on top of an orange cone"]
    single = scenes(40, seed=0, single=1.0)
    for key, caption in zip(keys(single), captions(single, seed=0, style="canonical"), strict=True):
        assert caption == f"a {key}"


def test_varied_captions_are_deterministic_and_vary():
    batch = scenes(200, seed=0)
    assert captions(batch, seed=1, style="varied") == captions(batch, seed=1, style="varied")
    assert captions(batch, seed=1, style="varied") != captions(batch, seed=2, style="varied")


def test_every_caption_word_is_in_the_vocabulary_and_every_word_is_used():
    batch = scenes(4000, seed=0)
    said = {word for caption in captions(batch, seed=0, style="varied") for word in caption.split()}
    assert said == set(vocabulary())
    assert list(vocabulary()) == sorted(set(vocabulary()))


def test_mirrored_wordings_are_rare_and_name_the_second_object_first():
    batch = scenes(4000, seed=0, single=0.0)
    mirrored = [c for c in captions(batch, seed=0, style="varied") if {"under", "below", "behind"} & set(c.split())]
    assert 0.05 < len(mirrored) / len(batch) < 0.15
    under = [captions(hero("on top of"), seed=s, style="varied")[0] for s in range(100)]
    under = [c for c in under if "under" in c]
    assert under
    assert all(c.index("cone") < c.index("cube") for c in under)


def test_an_article_fits_its_noun():
    said = " ".join(captions(scenes(500, seed=0), seed=0, style="varied"))
    assert " an orange" in said
    assert "a orange" not in said


def test_an_unknown_style_is_an_error():
    with pytest.raises(InputError, match="varied"):
        captions(scenes(1, seed=0), seed=0, style="plain")


# ---- render ----


@pytest.mark.parametrize("size", [16, 64, 100])
def test_pictures_have_the_promised_shape_and_range(size):
    pictures = render(scenes(5, seed=0), size)
    assert pictures.shape == (5, 3, size, size)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= -1
    assert pictures.max() <= 1


def test_a_picture_does_not_depend_on_its_batch():
    batch = scenes(150, seed=0)
    whole = render(batch, 64)
    torch.testing.assert_close(whole[140:150], render(batch[140:150], 64), rtol=0, atol=1e-6)


def test_no_scenes_give_no_pictures():
    assert render(scenes(0, seed=0), 64).shape == (0, 3, 64, 64)


def test_sizes_show_the_same_scene():
    batch = scenes(4, seed=1)
    small = torch.nn.functional.avg_pool2d(render(batch, 128), 2)
    assert (small - render(batch, 64)).abs().mean() < 0.01


def test_a_picture_is_too_small_to_draw():
    with pytest.raises(InputError, match="8"):
        render(scenes(1, seed=0), 8)


def test_the_nearer_object_covers_the_farther():
    """Swapping who is first in "in front of" swaps who is covered."""
    batch = scenes(400, seed=0, single=0.0)
    front = batch[batch.relation == RELATIONS.index("in front of")]
    reversed_order = replace(
        front,
        **{name: getattr(front, name).flip(1) for name in ("shape", "colour", "size", "position", "rotation")},
    )
    torch.testing.assert_close(render(front, 64), render(reversed_order, 64), rtol=0, atol=1e-5)
