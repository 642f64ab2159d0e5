"""Diversity sees a collapsed model, and the search for neighbours a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.blockworld import render, scenes
from fewstep.errors import InputError
from fewstep.images import to_pil
from fewstep.metrics.diversity import Diversity, blob, diversity, entropy
from fewstep.metrics.features import load_features
from fewstep.metrics.neighbours import nearest


def square(column: int, side: int = 16) -> Image.Image:
    image = Image.new("RGB", (64, 64), (180, 180, 185))
    image.paste((220, 30, 30), (column, 20, column + side, 20 + side))
    return image


def test_one_picture_again_and_again_is_no_diversity():
    found = diversity([[square(10)] * 16], [torch.ones(16, 8)])
    assert found.averages() == {"variance": 0.0, "places": 0.0, "sizes": 0.0}


def test_moving_and_growing_are_seen_apart():
    rows = torch.zeros(16, 8)
    moving = diversity([[square(3 * i) for i in range(16)]], [rows])
    growing = diversity([[square(20, 4 + 2 * i) for i in range(16)]], [rows])
    assert moving.averages()["places"] > 1
    assert moving.averages()["sizes"] == 0
    assert growing.averages()["sizes"] > 1.5


def test_a_share_of_the_base_knows_how_sure_it_is():
    base = Diversity(**dict.fromkeys(("variance", "places", "sizes"), torch.tensor([1.0, 2.0, 3.0]).double()))
    half = Diversity(variance=base.variance / 2, places=torch.tensor([0.5, 2.0, 0.5]).double(), sizes=base.sizes * 0)
    shares = half.relative_to(base)
    assert shares["variance"] == (0.5, 0.5, 0.5)
    assert shares["places"].value == 0.5
    assert shares["places"].low < 0.2 < 0.8 < shares["places"].high
    assert base.relative_to(half)["sizes"].high == float("inf")


def test_variance_is_that_of_the_features_within_a_prompt():
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    images = [[square(10)] * 16] * 2
    spread = diversity(images, [rows, rows + 100]).averages()["variance"]
    assert spread == pytest.approx(float(rows.double().var(0).sum()))


def test_a_single_picture_has_no_diversity_to_measure():
    with pytest.raises(InputError, match="at least 2"):
        diversity([[square(1)]], [torch.ones(1, 8)])


def test_the_blob_is_where_the_object_is():
    row, column, size = blob(square(32)).tolist()
    assert (row, column, size) == pytest.approx((28 / 64, 40 / 64, 16 / 64))
    assert blob(Image.new("RGB", (64, 64), (99, 99, 99))).tolist() == [0.5, 0.5, 0.0]


def test_entropy_in_bits():
    assert entropy(torch.full((16,), 0.3)) == 0
    assert entropy(torch.tensor([0.0, 1.0] * 8)) == 1


# neighbours


@pytest.fixture(scope="module")
def world():
    training, fresh = (to_pil(render(scenes(120, seed=seed), 64)) for seed in (51, 52))
    features = load_features()
    return training, features.of(training), fresh, features.of(fresh)


def test_a_planted_copy_is_found(world):
    training, training_features, fresh, features = world
    noisy = np.asarray(training[7]).astype(int) + np.random.default_rng(0).integers(-2, 3, (64, 64, 3))
    copy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    drawn, rows = [*fresh[:19], copy], torch.cat([features[:19], load_features().of([copy])])
    found = nearest(drawn, rows, training, training_features)
    assert found.index[-1] == 7
    assert found.copies.value == 1 / 20
    assert found.pixels[-1] < 4 < found.pixels[:-1].min()


def test_fresh_pictures_are_no_copies_and_as_far_as_fresh_ones(world):
    training, training_features, fresh, features = world
    found = nearest(fresh, features, training, training_features)
    assert found.copies.value == 0
    assert found.relative_distance(found) == 1
    assert nearest(training, training_features, training, training_features).relative_distance(found) < 0.1


def test_nothing_to_compare_with_is_refused(world):
    training, training_features, _, _ = world
    with pytest.raises(InputError, match="0 images and 120"):
        nearest([], training_features[:0], training, training_features)
