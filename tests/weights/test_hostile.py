"""Files that are broken, foreign or hostile: each is refused with words that help, and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import CheckpointError, InputError
from fewstep.models.zoo import Family
from fewstep.weights.load import load_model, open_tensors
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_single_file
from tests.factories import assert_same_weights, small_model

HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def safetensors(header: bytes = HEADER, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


FOREIGN = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265\n", "git-lfs pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "an HTML page"),
    "html2": (b"<HTML><head></head></HTML>", "an HTML page"),
    "json": (b'{"error": "Access denied"}', "a JSON text"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 90, "a GGUF file"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 90, "a gzip archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 90, "a PNG picture"),
    "pickle": (pickle.dumps({"a": 1}, 2), "a bare pickle"),
    "pickle5": (pickle.dumps({"a": list(range(99))}, 5), "a bare pickle"),
    "seven bytes": (b"\x07\0\0\0\0\0\0", "not a safetensors file"),
    "text": (b"just some words, and a few more of them", "not a safetensors file"),
    "huge header": (safetensors(length=2**63 - 1), "cut short"),
    "large header": (safetensors(length=100_000_001), "cut short"),
    "long header": (safetensors(length=90_000_000), "cut short"),
    "cut header": (safetensors()[:30], "cut short"),
    "cut data": (safetensors()[:-1], "promises 70 bytes, it has 69"),
    "trailing": (safetensors(data=b"\0" * 9), "not a safetensors file"),
    "no json": (safetensors(b"{this is no JSON at all}"), "cannot be read"),
    "deep json": (safetensors(b'{"a":' * 50_000), "cannot be read"),
    "list header": (safetensors(b'{"a":[1,2]}'), "cannot be read"),
    "no offsets": (safetensors(b'{"a":{"dtype":"F32","shape":[2]}}'), "cannot be read"),
    "offsets apart": (safetensors(entry(data_offsets=[4, 8])), "not a safetensors file"),
    "negative shape": (safetensors(entry(shape=[-2])), "not a safetensors file"),
    "overflowing shape": (safetensors(entry(shape=[2**62, 2**62])), "not a safetensors file"),
    "unknown dtype": (safetensors(entry(dtype="F99")), "not a safetensors file"),
    "wrong length": (safetensors(entry(shape=[3])), "not a safetensors file"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_foreign_and_broken_files_are_named(tmp_path: Path, name: str, ending: str) -> None:
    content, said = FOREIGN[name]
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        open_tensors(path)


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "many.safetensors"
    path.write_bytes(safetensors(json.dumps({str(i): empty for i in range(20_001)}).encode(), b""))
    with pytest.raises(CheckpointError, match="20001 tensors"):
        open_tensors(path)


class Shell:
    """A pickle of this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def archive(path: Path, content: Any, **settings: Any) -> Path:
    """A torch archive around a pickle of `content`."""
    pickled = content if isinstance(content, bytes) else pickle.dumps(content, 2)
    with zipfile.ZipFile(path, "w", **settings) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return path


@pytest.mark.parametrize("ending", [".ckpt", ".bin", ".pt", ".safetensors"])
def test_a_pickle_that_runs_a_command_does_not(tmp_path: Path, ending: str) -> None:
    marker = tmp_path / "owned"
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing was run"):
        open_tensors(archive(tmp_path / f"a{ending}", {"state_dict": Shell(marker)}))
    torch.save({"state_dict": Shell(marker)}, tmp_path / f"b{ending}")
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing was run"):
        open_tensors(tmp_path / f"b{ending}")
    assert not marker.exists()


MALICIOUS = {
    "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "exec": b"c__builtin__\nexec\n(S'1'\ntR.",
    "getattr": b"cbuiltins\ngetattr\n.",
    "pip": b"cpip\nmain\n](S'install'\neR.",
    "runpy": b"crunpy\n_run_code\n.",
    "numpy load": b"cnumpy\nload\n(S'x'\ntR.",
    "torch load": b"ctorch\nload\n(S'x'\ntR.",
    "torch hub": b"ctorch.hub\nload\n.",
    "attribute": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "submodule": b"ctorch\nserialization.os.system\n.",
    "stack global": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85R.",
    "instance": b"(S'id'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'id'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "text person": b"Pfile:///etc/passwd\n.",
    "lightning": b"cpytorch_lightning.callbacks\nModelCheckpoint\n.",
    "not a pickle": b"\xff\xff\xff\xff",
    "cut": pickle.dumps({"a": list(range(100))}, 2)[:-9],
    "nothing": b"",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_pickles_are_refused_before_they_are_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"nothing was run|a broken pickle"):
        open_tensors(archive(tmp_path / "model.ckpt", MALICIOUS[name]))


def test_what_trainers_left_in_published_files_is_read_as_nothing(tmp_path: Path) -> None:
    callbacks = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    loss = (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tRX\x08\x00\x00\x0012345678tR"
    )
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.arange(3.0)}}, buffer)
    with zipfile.ZipFile(buffer) as saved, zipfile.ZipFile(tmp_path / "model.ckpt", "w") as made:
        for info in saved.infolist():
            content = saved.read(info)
            if info.filename.endswith("data.pkl"):  # one dictionary, and two entries more
                content = content[:-1] + b"X\x09\x00\x00\x00callbacks" + b"}" + callbacks + loss + b"ss."
            made.writestr(info.filename, content)
    file = open_tensors(tmp_path / "model.ckpt")
    assert torch.equal(file.read("a", True), torch.arange(3.0))


def test_archives_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    good = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, good)

    def refused(said: str, content: bytes | None = None) -> None:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            open_tensors(path)

    refused("broken or cut zip", good.getvalue()[:-300])
    refused("compressed", archive(path, {"a": 1}, compression=zipfile.ZIP_DEFLATED).read_bytes())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    refused("compressed")
    with zipfile.ZipFile(path, "w") as nested:
        nested.writestr("inner.ckpt", good.getvalue())
    refused("without the data.pkl")
    with zipfile.ZipFile(path, "w") as two:
        two.writestr("a/data.pkl", b"N.")
        two.writestr("b/data.pkl", b"N.")
    refused("without the data.pkl of one")
    for name in ("../../etc/cron.d/x", "/etc/passwd", "archive\\..\\x"):
        with zipfile.ZipFile(path, "w") as leaving:
            leaving.writestr("archive/data.pkl", b"N.")
            leaving.writestr(name, b"x")
        refused("leaves its folder")
    with zipfile.ZipFile(path, "w") as many:
        for i in range(10_001):
            many.writestr(f"archive/data/{i}", b"")
    refused("10001 entries")
    refused("not a dictionary of tensors", archive(path, [1, 2]).read_bytes())
    refused("holds 0 tensors", archive(path, {"a": 1}).read_bytes())


def test_a_directory_that_lies_about_sizes_is_a_zip_bomb(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.ckpt", OrderedDict())
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 2**31)  # the uncompressed size of the first entry
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="zip bomb"):
        open_tensors(path)


@pytest.fixture
def single(tmp_path: Path) -> tuple[LoadedModel, Path]:
    """A small SD 1, its single file, and a tokenizer's folder beside it."""
    model = small_model("sd1")
    save_single_file(model, tmp_path / "model.safetensors")
    model.tokenizers[0].save(tmp_path / "tokenizer")
    return model, tmp_path / "model.safetensors"


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, dtype=torch.float32, **({"tokenizer": path.parent} | options))


def test_checkpoints_load_with_what_trainers_left_in_them(single: tuple[LoadedModel, Path]) -> None:
    model, path = single
    tensors = load_file(path)
    extra = {
        "betas": torch.zeros(1000, dtype=torch.float64),
        "sqrt_recipm1_alphas_cumprod": torch.zeros(3),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    torch.save({"state_dict": tensors | extra, "global_step": 470000, "lr": 1e-4}, path.with_name("old.ckpt"))
    assert_same_weights(load(path.with_name("old.ckpt")), model)
    path.with_name("old.ckpt").rename(path.with_name("old.safetensors"))
    assert_same_weights(load(path.with_name("old.safetensors")), model)
    path.replace(path.with_suffix(".ckpt"))
    assert_same_weights(load(path.with_suffix(".ckpt")), model)


def test_not_a_number_is_no_reason_to_refuse(single: tuple[LoadedModel, Path]) -> None:
    _, path = single
    tensors = load_file(path) | {"model.diffusion_model.out.2.bias": torch.full((4,), float("nan"))}
    save_file(tensors, path)
    assert load(path).networks.unet.conv_out.bias.isnan().all()


def test_all_that_does_not_fit_a_single_file_is_told_at_once(single: tuple[LoadedModel, Path]) -> None:
    _, path = single
    tensors = load_file(path)
    del tensors["first_stage_model.quant_conv.bias"]
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    tensors["model.diffusion_model.guest"] = torch.zeros(5)
    tensors["somewhere.else"] = torch.zeros(5)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    for said in (
        "1 missing: first_stage_model.quant_conv.bias",
        "out.2.bias: file (5,), model (4,)",
        "2 unexpected: model.diffusion_model.guest, somewhere.else",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
        (["first_stage_model.quant_conv.bias"], "an autoencoder alone"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet without its text towers"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one part of a diffusers folder"),
        (["w"], "something else"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"], "looks like sd1, but"),
    ],
)
def test_other_models_are_named(tmp_path: Path, names: list[str], said: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(CheckpointError, match=said):
        load(path)


def test_what_a_single_file_does_not_say_is_asked_for(
    tmp_path: Path, single: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))
    with pytest.raises(InputError, match="pass tokenizer=, a folder with tokenizer as in CompVis"):
        load(single[1], tokenizer=None)
    with pytest.raises(InputError, match="pass tokenizer="):
        load(single[1], tokenizer=tmp_path / "nowhere")
    assert load(single[1], tokenizer=tmp_path / "tokenizer").tokenizers[0].window == 77
    model = small_model("sd2")
    save_single_file(model, tmp_path / "sd2.safetensors")
    save_file(load_file(tmp_path / "sd2.safetensors"), tmp_path / "silent.safetensors")
    assert load(tmp_path / "sd2.safetensors").spec.scheduler.prediction == "v_prediction"
    with pytest.raises(InputError, match="pass prediction='v_prediction'"):
        load(tmp_path / "silent.safetensors")
    silent = load(tmp_path / "silent.safetensors", prediction="epsilon")
    assert (silent.spec.scheduler.prediction, silent.spec.defaults.width) == ("epsilon", 512)
    for steps in (140000, 220000, 0):
        torch.save({"state_dict": load_file(tmp_path / "sd2.safetensors"), "global_step": steps}, tmp_path / "sd2.ckpt")
        with pytest.raises(InputError, match="does not say what it predicts"):
            load(tmp_path / "sd2.ckpt")
    torch.save({"state_dict": load_file(tmp_path / "sd2.safetensors"), "global_step": 875000}, tmp_path / "sd2.ckpt")
    assert load(tmp_path / "sd2.ckpt").spec.scheduler.prediction == "epsilon"


def test_a_single_file_is_not_written_where_it_would_read_as_another_model(tmp_path: Path) -> None:
    from dataclasses import replace

    from fewstep.models.unet import UNet
    from tests.factories import unet_config

    config = unet_config("sd1")
    stages = tuple(replace(stage, heads=4) for stage in config.stages)
    odd = small_model("sd1").with_unet(UNet(replace(config, stages=stages)))
    with pytest.raises(InputError, match="save a folder"):
        save_single_file(odd, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_inpainting_is_told_by_nine_channels(tmp_path: Path, family: Family) -> None:
    model = small_model(family, in_channels=9)
    save_single_file(model, tmp_path / "model.safetensors")
    for name, words in zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=False):
        words.save(tmp_path / name)
    assert load(tmp_path / "model.safetensors").spec.unet.in_channels == 9
