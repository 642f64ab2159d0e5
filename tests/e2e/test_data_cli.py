"""`fewstep data` as a user meets it: a flawed collection becomes shards and caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fewstep.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: Any) -> Any:
    def run(*arguments: object) -> Outcome:
        code = main(["data", *map(str, arguments)])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pictures of blockworld in two tars, with what collections from the web suffer from."""
    folder = tmp_path_factory.mktemp("data") / "blockworld"
    assert not main(["data", "blockworld", "--count", "300", "--per-tar", "200", "--size", "64", "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def prepared(tars: Path) -> Path:
    out = tars.parent / "prepared"
    assert not main(["data", "prepare", str(tars), "--out", str(out), "--min-size", "64", "--encoding", "png", "-q"])
    return out


def test_a_flawed_collection_is_sorted_out(tars, prepared, cli):
    shown = json.loads(cli("inspect", prepared, "--json").out)
    assert shown["samples"] == 300 == shown["accepted"] + sum(shown["rejected"].values())
    assert 180 < shown["accepted"] < 250, "about 70 % are good"
    for reason in ("too_small", "low_aesthetic", "watermark", "unsafe", "missing_aesthetic", "damaged_picture"):
        assert shown["rejected"][reason], f"some are {reason}"
    assert shown["rejected"]["duplicate"] + shown["rejected"]["near_duplicate"]


def test_scenes_that_are_held_out_are_never_written(prepared):
    """Captions in the world's plain words: none is the canonical caption of a held-out scene."""
    from fewstep.blockworld import captions, keys, scenes, split_of
    from fewstep.data.shards import open_shards

    shards = open_shards(prepared)
    held = scenes(3000, seed=1, split="heldout")
    assert {split_of(key) for key in keys(held)} == {"heldout"}
    assert not set(captions(held, seed=0, style="canonical")) & set(shards.captions(range(len(shards))))


def test_the_summary_is_for_people_and_the_path_for_programs(tars, prepared, cli):
    outcome = cli("prepare", tars, "--out", prepared, "--min-size", 64, "--encoding", "png")
    assert (outcome.code, outcome.out) == (0, f"{prepared}\n")
    assert "of 300 pictures accepted" in outcome.err
    assert "buckets 64x64" in outcome.err


def test_whole_shards_are_verified_and_damaged_ones_named(prepared, cli, tmp_path):
    assert cli("inspect", prepared, "--verify").code == 0
    shard = next((prepared / "shards").iterdir())
    sound = shard.read_bytes()
    try:
        shard.write_bytes(sound[:-1] + b"x")
        outcome = cli("inspect", prepared, "--verify")
    finally:
        shard.write_bytes(sound)
    assert outcome.code == 3
    assert f"{shard} is not what the manifest says" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--missing", "kep"), "did you mean 'keep'"),
        (("--encoding", "gif"), "unknown encoding 'gif'"),
        (("--side", "100"), "side 100 is not a multiple of the step 64"),
        (("--min-size", "off"), "side is not given"),
        (("--engine", "dask"), "unknown engine 'dask'"),
        (("--blocklist", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--max-watermark", "low"), "Invalid value for '--max-watermark'"),
    ],
)
def test_options_that_cannot_be_are_told_in_a_line(tars, tmp_path, cli, options, message):
    outcome = cli("prepare", tars, "--out", tmp_path / "out", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_limits_can_be_switched_off(tars, tmp_path, cli):
    off = [word for limit in ("min-aesthetic", "max-watermark", "max-unsafe", "near") for word in (f"--{limit}", "off")]
    assert cli("prepare", tars, "--out", tmp_path / "out", "--min-size", 64, *off).code == 0
    rejected = json.loads((tmp_path / "out" / "manifest.json").read_text())["rejected"]
    assert {reason for reason, count in rejected.items() if count} == {"too_small", "damaged_picture", "duplicate"}


@pytest.mark.parametrize("what", ["latents", "text"])
def test_the_embedded_model_fills_a_cache(prepared, tmp_path, cli, what):
    assert cli("cache", prepared, "--out", tmp_path / what, "--what", what, "--device", "cpu", "-q").code == 0
    again = cli("cache", prepared, "--out", tmp_path / what, "--what", what, "--store", "float32", "--device", "cpu")
    assert again.code == 3
    assert "made with other transform" in again.err


def test_a_cache_holds_what_the_model_s_parts_give(prepared, tmp_path, cli, embedded):
    import torch

    from fewstep.data.cache import latent_key, open_cache
    from fewstep.data.shards import open_shards, stacked_images

    assert cli("cache", prepared, "--out", tmp_path / "c", "--store", "float32", "--device", "cpu", "-q").code == 0
    shards, vae = open_shards(prepared), embedded.networks.autoencoder
    key = latent_key(shards, vae.state_dict(), vae.config.scaling_factor, torch.float32)
    mean, std = embedded.engine.encode(stacked_images(shards.read([5, 2])))
    read = open_cache(tmp_path / "c", shards, key).read([5, 2])
    assert torch.allclose(read["mean"], mean, atol=1e-4)
    assert torch.allclose(read["std"], std, atol=1e-4)


def test_a_cache_of_something_unknown_is_refused(prepared, tmp_path, cli):
    assert cli("cache", prepared, "--out", tmp_path / "x", "--what", "latent").err.count("did you mean 'latents'")
    assert cli("cache", tmp_path, "--out", tmp_path / "x").code == 2
