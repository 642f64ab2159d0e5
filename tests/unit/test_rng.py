"""A picture's noise depends on its seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.errors import InputError
from fewstep.rng import SeededNoise, seeds_for

SHAPE = (4, 5, 3)


def test_noise_is_float32_on_the_cpu():
    noise = SeededNoise([3, 4], SHAPE)()
    assert (noise.shape, noise.dtype, noise.device.type) == ((2, *SHAPE), torch.float32, "cpu")


def test_batch_and_order_do_not_change_a_picture_s_noise():
    batch, turned = SeededNoise([5, 6, 7], SHAPE), SeededNoise([7, 5], SHAPE)
    alone = SeededNoise([7], SHAPE)
    for _ in range(3):
        draw, other, single = batch(), turned(), alone()
        assert draw[2].equal(other[0])
        assert draw[2].equal(single[0])
        assert draw[0].equal(other[1])


def test_every_draw_is_new_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise = SeededNoise([5], SHAPE)
    assert not noise().equal(noise())
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("seeds", [[0], [1, 2, 2**63 - 1]])
def test_noise_is_diffusers_noise(seeds):
    tools = pytest.importorskip("diffusers.utils.torch_utils")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = SeededNoise(seeds, SHAPE)
    for _ in range(2):
        theirs = tools.randn_tensor((len(seeds), *SHAPE), generators, torch.device("cpu"), torch.float32)
        assert noise().equal(theirs)


def test_seeds_count_up_or_are_taken_as_given():
    assert seeds_for(7, 3) == (7, 8, 9)
    assert seeds_for([9, 0, 9], 3) == (9, 0, 9)
    assert seeds_for(2**63 - 1, 1) == (2**63 - 1,)


def test_numbers_of_numpy_and_torch_are_numbers():
    assert seeds_for(np.int64(7), 2) == seeds_for(torch.tensor(7), 2) == (7, 8)
    assert seeds_for(np.array([3, 1]), 2) == seeds_for([np.int32(3), torch.tensor(1)], 2) == (3, 1)


def test_drawn_seeds_are_fresh_and_portable():
    drawn = seeds_for(None, 64)
    assert len(set(drawn)) == 64
    assert all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        (-1, 1),
        (2**63, 1),
        (2**63 - 1, 2),
        (True, 1),
        (1.0, 1),
        ("7", 1),
        ([1, 2], 3),
        ([1, -2], 2),
        ([], 1),
        (np.float64(3), 1),
    ],
)
def test_seeds_out_of_range_are_refused(seed, count):
    with pytest.raises(InputError, match="seed"):
        seeds_for(seed, count)
