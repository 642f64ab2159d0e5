"""The hub: which files are taken, what the cache holds, and what is said without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.errors import CheckpointError, InputError
from fewstep.models.zoo import CATALOGUE, entry
from fewstep.weights.fetch import cached_folder, fetch, is_cached, named, resolve, wanted_files
from fewstep.weights.load import load_model
from fewstep.weights.save import save_model
from tests.factories import assert_same_weights, small_model

SD = "CompVis/stable-diffusion-v1-4"
COMMIT = "133a221b8aa7292a167afc5127cb63fb5005638b"
SETTINGS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
]
OTHERS = ["README.md", ".gitattributes", "sd-v1-4.ckpt", "safety_checker/model.safetensors", "unet/flax_model.msgpack"]
OTHERS += ["safety_checker/config.json", "feature_extractor/preprocessor_config.json", "unet/openvino_model.bin.xml"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, source: str = SD, commit: str = COMMIT, family: Any = "sd1") -> Path:
    """A model in the hub's cache, as its `main`."""
    store = cache / f"models--{source.replace('/', '--')}"
    (store / "refs").mkdir(parents=True, exist_ok=True)
    (store / "refs" / "main").write_text(commit)
    folder = store / "snapshots" / commit
    save_model(small_model(family), folder)
    return folder


def weights(*names: str) -> list[str]:
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    return [f"{part}{name}" for part in parts for name in names]


def test_only_what_drawing_needs_is_taken() -> None:
    names = [
        *SETTINGS,
        *OTHERS,
        *weights(".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".non_ema.safetensors"),
    ]
    assert sorted(wanted_files(names, half=False)) == sorted([*SETTINGS, *weights(".safetensors")])
    assert sorted(wanted_files(names, half=True)) == sorted([*SETTINGS, *weights(".fp16.safetensors")])


def test_pickles_are_taken_where_nothing_else_is() -> None:
    names = [*SETTINGS, *OTHERS, *weights(".bin")]
    assert sorted(wanted_files(names, half=True)) == sorted([*SETTINGS, *weights(".bin")])


def test_shards_are_taken_with_their_index() -> None:
    stem = "unet/diffusion_pytorch_model"
    whole = [
        f"{stem}.safetensors.index.json",
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
    ]
    half = [
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16-00001-of-00002.safetensors",
        f"{stem}.fp16-00002-of-00002.safetensors",
    ]
    names = ["model_index.json", *whole, *half]
    assert set(wanted_files(names, half=False)) >= set(whole)
    assert not set(wanted_files(names, half=False)) & set(half)
    assert set(wanted_files(names, half=True)) >= set(half)
    assert not set(wanted_files(names, half=True)) & set(whole)


def test_a_tiny_autoencoder_lies_at_the_root() -> None:
    names = ["README.md", "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    assert wanted_files(names, half=False) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_what_is_cached_needs_no_network(cache: Path) -> None:
    assert not is_cached(entry("sd-v1-4"))
    folder = put(cache)
    assert is_cached(entry("sd-v1-4"))
    assert cached_folder(SD) == cached_folder(SD, "main") == cached_folder(SD, COMMIT) == folder
    assert cached_folder(SD, "v2") is None
    by_name = load_model("sd-v1-4", dtype=torch.float32)
    assert_same_weights(by_name, load_model(SD, dtype=torch.float32))
    assert (by_name.spec.name, by_name.spec.licence) == ("sd-v1-4", "creativeml-openrail-m")
    assert (by_name.spec.defaults.steps, by_name.spec.defaults.width) == (50, 512)


def test_a_turbo_model_takes_its_steps_from_the_catalogue(cache: Path) -> None:
    put(cache, "stabilityai/sd-turbo", family="sd2")
    for name in ("sd-turbo", "stabilityai/sd-turbo"):
        defaults = load_model(name, dtype=torch.float32).spec.defaults
        assert (defaults.steps, defaults.guidance_scale, defaults.width) == (1, 0.0, 512)


def test_a_half_cached_model_is_not_cached(cache: Path) -> None:
    folder = put(cache)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert not is_cached(entry("sd-v1-4"))
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        resolve("sd-v1-4", half=False)


def test_without_a_network_the_way_out_is_told(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not in the local cache.*network.*path of a folder"):
        load_model("nobody/nothing", dtype=torch.float32)


def test_a_download_asks_for_the_wanted_files_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    names = [*SETTINGS, *OTHERS, *weights(".safetensors", ".fp16.safetensors")]

    class Hub:
        def model_info(self, source: str, *, revision: str | None) -> Any:
            asked.update(source=source, revision=revision)
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(patterns=sorted(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert fetch(SD, half=True, revision="main") == tmp_path
    assert asked == {"source": SD, "revision": "main", "patterns": sorted(wanted_files(names, half=True))}


@pytest.mark.parametrize(
    "name", ["a/b/c", "../x", "a/..", "a b/c", "a/b\0", "a/b?x", "a\\b/c", "é/x", f"{'a' * 97}/b", "a/"]
)
def test_malformed_hub_ids_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(InputError):
        fetch(name, half=False)
    with pytest.raises(InputError):
        resolve(name, half=False)


@pytest.mark.parametrize("revision", ["../../x", "a b", "a//b", "", "/etc", "\0"])
def test_malformed_revisions_are_refused(cache: Path, revision: str) -> None:
    with pytest.raises(InputError, match="is not a revision"):
        fetch(SD, half=False, revision=revision)


def test_a_path_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("some/model", half=False) == (Path("some/model"), None)


def test_the_table_of_models_needs_no_torch() -> None:
    script = """
import sys
from fewstep.models.zoo import CATALOGUE
from fewstep.weights.fetch import is_cached
print([is_cached(known) for known in CATALOGUE.values()] and 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_embedded_model_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fewstep.weights.fetch.ASSETS", tmp_path)
    embedded = [known.name for known in CATALOGUE.values() if known.source is None]
    assert embedded == ["blocks-base", "blocks-small", "blocks-turbo", "blocks-tiny"]
    assert not is_cached(entry("blocks-base"))
    with pytest.raises(CheckpointError, match="install fewstep again"):
        load_model("blocks-base", dtype=torch.float32)
    save_model(small_model("sd1"), tmp_path / "blocks-base")
    loaded = load_model("blocks-base", dtype=torch.float32)
    assert (loaded.spec.name, loaded.spec.family, loaded.spec.licence, loaded.spec.defaults.steps) == (
        "blocks-base",
        "blocks",
        "Apache-2.0",
        3,
    )


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("sdxl", "sdxl-base"),
        ("SDXL-Turbo", "sdxl-turbo"),
        ("sdxl turbo", "sdxl-turbo"),
        ("sd14", "sd-v1-4"),
        ("Stable Diffusion v1.4", "sd-v1-4"),
        ("sd21", "sd-v2-1"),
        ("stable-diffusion-2-1", "sd-v2-1"),
        ("Blocks-Turbo", "blocks-turbo"),
        ("'sd-turbo'", "sd-turbo"),
        ("stabilityai/sd-turbo", "sd-turbo"),
        ("StabilityAI/sd-turbo/", "sd-turbo"),
        ("https://huggingface.co/stabilityai/sd-turbo", "sd-turbo"),
        ("https://huggingface.co/stabilityai/sd-turbo/tree/main", "sd-turbo"),
        ("https://huggingface.co/stabilityai/sd-turbo/blob/main/sd_turbo.safetensors", "sd-turbo"),
        ("http://hf.co/stabilityai/sd-turbo/resolve/main/sd_turbo.safetensors?download=true", "sd-turbo"),
    ],
)
def test_models_go_by_what_people_type(typed: str, name: str) -> None:
    assert named(typed) == CATALOGUE[name]


def test_an_address_on_the_hub_is_its_id() -> None:
    assert named("https://huggingface.co/some/model/tree/main/unet") == "some/model"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("sd15", "sd-v1-4"),
        ("SD 1.5", "sd-v1-4"),
        ("sd2", "sd-v2-1"),
        ("turbo", "blocks-turbo, sd-turbo or sdxl-turbo"),
        ("sd-turob", "did you mean 'sd-turbo'"),
        ("", "unknown model ''"),
        ("https://huggingface.co/some/model/tree/v2", "'some/model' and the revision 'v2'"),
        ("https://elsewhere.example/some/model", "download it"),
        ("https://huggingface.co/some", "download it"),
        ("a\0b", "unknown model"),
        ("~nobody-of-that-name/x", "no file or folder"),
        ("x" * 5000, "unknown model"),
    ],
)
def test_no_model_is_guessed(typed: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        named(typed)
    assert len(str(error.value)) < 500
