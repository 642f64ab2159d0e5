"""Prepared shards, the batches drawn from them, and what networks made of them, as a training run meets them."""

from __future__ import annotations

import json
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import cache as caches
from fewstep.data.batches import BatchPlan, batch_plan
from fewstep.data.buckets import Size
from fewstep.data.cache import CacheKey, cache_key, latent_encoder, open_cache, text_encoder, write_cache
from fewstep.data.filter_inputs import Settings
from fewstep.data.filters import Filter
from fewstep.data.prepare import prepare
from fewstep.data.shards import Shards, open_shards, stacked_images
from fewstep.errors import CheckpointError, InputError, NotFiniteError
from fewstep.formats.tar_writer import TarWriter

COUNT = 40


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 40 pictures in three buckets and several shards, scores rising from 5.1."""
    folder = tmp_path_factory.mktemp("prepared")
    with (folder / "in.tar").open("wb") as file:
        tar = TarWriter(file)
        for i in range(COUNT):
            colours = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            data = BytesIO()
            size = [(100, 100), (160, 90), (90, 160)][i * i % 3 + (i % 5 == 0)]
            Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(data, "PNG")
            tar.add(f"{i:03d}.png", data.getvalue())
            said = {"caption": f"picture {i}", "aesthetic": 5.1 + i / 10, "punsafe": 0.0}
            tar.add(f"{i:03d}.json", json.dumps(said | ({"pwatermark": 0.1} if i % 4 else {})).encode())
        tar.end()
    rule = Filter(min_size=64, missing="keep")
    prepare([folder / "in.tar"], folder / "out", Settings(filter=rule, side=64, step=16, encoding="png", per_shard=7))
    return folder / "out"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    for path in prepared.rglob("*"):
        if path.is_file():
            target = tmp_path / "out" / path.relative_to(prepared)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "out"


@pytest.fixture
def shards(prepared: Path) -> Shards:
    return open_shards(prepared)


def test_every_picture_is_read_with_what_is_known_of_it(shards):
    assert len(shards) == COUNT
    read = shards.read(range(COUNT))
    assert sorted(sample.caption for sample in read) == sorted(f"picture {i}" for i in range(COUNT))
    for sample in read:
        number = int(sample.caption.split()[1])
        size = shards.manifest.sizes[shards.buckets[sample.index]]
        assert (sample.image.dtype, sample.image.shape) == (torch.uint8, (3, size.height, size.width))
        assert sample.original_size in {(100, 100), (90, 160), (160, 90)}
        assert sample.scores["aesthetic"] == 5.1 + number / 10
        assert ("watermark" in sample.scores) == (number % 4 > 0)


def test_the_crop_is_the_one_that_was_made(shards):
    """A 160 x 90 picture covers 80 x 48 as 85 x 48, of which 2 columns are cut off at the left."""
    wide = next(sample for sample in shards.read(range(COUNT)) if sample.original_size == (90, 160))
    assert (tuple(wide.image.shape[1:]), wide.crop) == ((48, 80), (0, 2))


def test_the_order_asked_for_is_kept(shards):
    assert [sample.index for sample in shards.read([9, 0, 9])] == [9, 0, 9]
    assert shards.captions([9, 0]) == [sample.caption for sample in shards.read([9, 0])]
    with pytest.raises(InputError, match=r"no picture 40; .* 0 to 39"):
        shards.read([COUNT])


def test_images_are_stacked_in_the_pipeline_s_range(shards):
    samples = shards.read(np.flatnonzero(shards.buckets == 0)[:3])
    images = stacked_images(samples)
    assert (images.dtype, len(images)) == (torch.float32, 3)
    assert torch.equal(((images + 1) * 127.5).round().byte(), torch.stack([sample.image for sample in samples]))


def test_a_filter_can_be_tightened_when_reading(shards):
    chosen = shards.select(Filter(min_size=64, min_aesthetic=7.0))  # a missing watermark score rejects now
    numbers = {int(caption.split()[1]) for caption in shards.captions(chosen)}
    assert numbers == {i for i in range(COUNT) if 5.1 + i / 10 > 7.0 and i % 4}
    digest = shards.index["sha256"][chosen[0]].tobytes().hex()
    again = shards.select(Filter(min_size=64, min_aesthetic=7.0, blocked=frozenset({digest})))
    assert again.tolist() == chosen.tolist()[1:]


def test_a_shard_that_vanishes_is_named(folder):
    shards = open_shards(folder)
    path = folder / "shards" / shards.manifest.shards[0]["name"]
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read any more"):
        shards.read([0])
    with pytest.raises(CheckpointError, match=rf"{path.name} is gone"):
        open_shards(folder)
    assert [line for line in shards.damaged() if path.name in line]


def test_a_flipped_bit_is_found(folder):
    shards = open_shards(folder)
    path = folder / "shards" / shards.manifest.shards[0]["name"]
    data = bytearray(path.read_bytes())
    data[int(shards.index["start"][0]) + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"picture 0 in .*{path.name} is damaged"):
        shards.read([0])
    assert list(shards.damaged()) == [f"{path} is not what the manifest says"]


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors"])
def test_a_broken_account_is_told(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=name):
        open_shards(folder)


def test_folders_that_are_not_prepared_are_refused(tmp_path, folder):
    with pytest.raises(InputError, match="no folder of prepared shards"):
        open_shards(tmp_path)
    (folder / "_SUCCESS").unlink()
    (folder / ".work").mkdir()
    with pytest.raises(InputError, match="not finished yet"):
        open_shards(folder)


def plan(counts: list[int], batch_size: int, seed: int = 0) -> BatchPlan:
    """A plan over buckets of so many pictures, without any."""
    edges = np.cumsum([0, *counts])
    members = [np.arange(low, high) for low, high in pairwise(edges)]
    sizes = [Size(8 * i, 8) for i in range(1, len(counts) + 1)]
    return BatchPlan(sizes=sizes, members=members, batch_size=batch_size, seed=seed)


COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(COUNTS, st.integers(1, 20), st.integers(0, 2**63))
def test_every_picture_is_drawn_once_an_epoch_but_for_the_rest_that_waits(counts, batch_size, seed):
    drawn, whole = Counter[int](), plan(counts, batch_size, seed)
    for epoch in range(3):
        for step in range(whole.first_step(epoch), whole.first_step(epoch + 1)):
            assert whole.epoch(step) == epoch
            drawn.update(whole.batch(step).indices.tolist())
        for members in whole.members:
            times = [drawn[i] for i in members.tolist()]
            waiting = sum(epoch + 1 - time for time in times)
            assert max(times) <= epoch + 1
            assert 0 <= waiting < batch_size


@given(COUNTS, st.integers(1, 20), st.integers(0, 200))
def test_a_batch_is_of_one_bucket_and_needs_no_history(counts, batch_size, step):
    batch = plan(counts, batch_size).batch(step)
    whole = plan(counts, batch_size)
    walked = [whole.batch(each) for each in range(step + 1)]
    assert walked[step].indices.tolist() == batch.indices.tolist()
    assert len(batch.indices) == batch_size
    members = whole.members[list(whole.sizes).index(batch.size)]
    assert set(batch.indices.tolist()) <= set(members.tolist())


def test_seeds_and_epochs_have_their_own_orders():
    def epoch(seed: int, number: int) -> list[int]:
        whole = plan([60, 36], 6, seed)
        return [i for k in range(16) for i in whole.batch(number * 16 + k).indices.tolist()]

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert all(sorted(order) == list(range(96)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9


def test_the_order_is_the_same_for_ever():
    """Runs go on across versions of fewstep and numpy: this order may never change."""
    assert plan([10, 6], 4, seed=1).batch(0).indices.tolist() == [4, 8, 2, 0]
    assert plan([10, 6], 4, seed=1).batch(1000).indices.tolist() == [1, 5, 6, 0]


def test_places_in_a_batch_are_evenly_shuffled():
    places = np.array([plan([16], 16, seed).batch(0).indices for seed in range(400)])
    assert np.abs(places.mean(0) - 7.5).max() < 1.2  # 5 standard errors


def test_plans_of_shards_obey_their_filter(shards):
    rule = Filter(min_size=64, min_aesthetic=7.0)
    whole = batch_plan(shards, batch_size=4, seed=0, rule=rule)
    drawn = {i for step in range(30) for i in whole.batch(step).indices.tolist()}
    assert drawn == set(shards.select(rule).tolist())
    with pytest.raises(InputError, match="no picture to train on"):
        batch_plan(shards, batch_size=4, seed=0, rule=Filter(min_aesthetic=11.0))
    with pytest.raises(InputError, match="batch_size is 0"):
        batch_plan(shards, batch_size=0, seed=0)


def moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for an autoencoder: every eighth pixel and its half, four channels."""
    small = images[:, [0, 1, 2, 0], ::8, ::8]
    return small, small / 2


@pytest.fixture
def key(shards: Shards) -> CacheKey:
    return cache_key(shards, {"w": torch.arange(4.0)}, "moments float16")


@pytest.fixture
def small_chunks(monkeypatch: Any) -> None:
    monkeypatch.setattr(caches, "CHUNK", 6)
    monkeypatch.setattr(caches, "MOST_OPEN", 2)


def filled(folder: Path, shards: Shards, key: CacheKey, **options: Any) -> int:
    encode = latent_encoder(shards, moments, torch.float16)
    return len(list(write_cache(folder, shards, encode, key, batch=4, **options)))


def test_cached_latents_are_those_of_the_pictures(shards, key, tmp_path, small_chunks):
    filled(tmp_path, shards, key)
    cache = open_cache(tmp_path, shards, key)
    for bucket in range(len(shards.manifest.buckets)):
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(shards.buckets == bucket))
        mean, std = moments(stacked_images(shards.read(chosen)))
        read = cache.read(chosen)
        assert torch.equal(read["mean"], mean.half())
        assert torch.equal(read["std"], std.half())


def test_cached_texts_are_those_of_the_captions(shards, key, tmp_path):
    def states(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.tensor([float(caption.split()[1]) for caption in captions])
        return numbers[:, None, None].expand(-1, 7, 5), numbers[:, None]

    list(write_cache(tmp_path, shards, text_encoder(shards, states, torch.float32), key))
    read = open_cache(tmp_path, shards, key).read([3, 30])
    assert [f"picture {number:.0f}" for number in read["pooled"][:, 0]] == shards.captions([3, 30])
    assert read["context"].shape == (2, 7, 5)


def test_an_interrupted_cache_goes_on_where_it_was(shards, key, tmp_path, small_chunks):
    encode = latent_encoder(shards, moments, torch.float16)
    first = write_cache(tmp_path, shards, encode, key)
    next(first)
    first.close()
    with pytest.raises(CheckpointError, match=r"lacks .* give the command again"):
        open_cache(tmp_path, shards, key)
    stamp = (tmp_path / "chunk-000000.safetensors").stat().st_mtime_ns
    filled(tmp_path, shards, key)
    assert (tmp_path / "chunk-000000.safetensors").stat().st_mtime_ns == stamp
    assert len(open_cache(tmp_path, shards, key).read(range(2))["mean"]) == 2


def test_ranks_share_the_work(shards, key, tmp_path, small_chunks):
    filled(tmp_path / "one", shards, key)
    count = sum(filled(tmp_path / "two", shards, key, share=(rank, 2)) for rank in (0, 1))
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert count == len(files) - 1


@pytest.mark.parametrize("name", ["weights", "transform", "data"])
def test_a_stale_cache_is_refused(shards, key, tmp_path, name):
    filled(tmp_path, shards, key)
    other = CacheKey(**{**vars(key), name: "other"})
    for use in (lambda: open_cache(tmp_path, shards, other), lambda: filled(tmp_path, shards, other)):
        with pytest.raises(CheckpointError, match=f"made with other {name} .* delete it"):
            use()


def test_a_file_of_another_cache_is_refused(shards, key, tmp_path, small_chunks):
    other = cache_key(shards, {"w": torch.arange(5.0)}, key.transform)
    assert other.weights != key.weights
    filled(tmp_path / "a", shards, key)
    filled(tmp_path / "b", shards, other)
    (tmp_path / "b" / "chunk-000001.safetensors").replace(tmp_path / "a" / "chunk-000001.safetensors")
    with pytest.raises(CheckpointError, match=r"chunk-000001.* other weights"):
        open_cache(tmp_path / "a", shards, key).read([6])


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_a_damaged_cache_is_refused_and_mended_by_the_same_command(shards, key, tmp_path, damage, small_chunks):
    filled(tmp_path, shards, key)
    path = tmp_path / "chunk-000000.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]) if damage == "flipped" else sound[:-5])
    with pytest.raises(CheckpointError, match=r"chunk-000000\.safetensors .*(damaged|cannot be read).*again"):
        open_cache(tmp_path, shards, key).read([0])
    filled(tmp_path, shards, key)
    assert path.read_bytes() == sound


def test_what_is_not_finite_is_not_stored(shards, key, tmp_path):
    def broken(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, :, ::8, ::8] * float("nan"), images[:, :, ::8, ::8]

    with pytest.raises(NotFiniteError, match=r"mean .* NaN"):
        list(write_cache(tmp_path, shards, latent_encoder(shards, broken, torch.float16), key))
    assert not list(tmp_path.glob("*.safetensors"))


def test_one_changed_weight_makes_another_key(shards):
    weights = torch.zeros(1000)
    changed = weights.clone()
    changed[500] = 1e-30
    nothing = SimpleNamespace(manifest=shards.manifest)
    assert cache_key(nothing, {"w": weights}, "t") != cache_key(nothing, {"w": changed}, "t")
    assert cache_key(nothing, {"w": weights}, "t") != cache_key(nothing, {"w": weights.half()}, "t")
