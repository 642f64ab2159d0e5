"""Configs, vocabularies, LoRAs, pictures and notes that are broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from fewstep import images
from fewstep.adapters.read import read_lora
from fewstep.engines.autotune import Autotuner
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.load import load_model
from fewstep.weights.save import save_model
from tests.factories import small_model
from tests.hostile.frame import assert_cheap, assert_refused, attempt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sdxl"):
        save_model(small_model(family), folder / family)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of a small SDXL whose files may be spoilt."""
    return Path(shutil.copytree(saved / "sdxl", tmp_path / "model"))


UNET, VAE, TEXT, SCHEDULER, INDEX = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
)
NAN, HUGE, DIGITS = float("nan"), 10**400, int("9" * 4000)
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "no channels": (UNET, {"block_out_channels": []}),
    "channels that are texts": (UNET, {"block_out_channels": ["64", "128"]}),
    "channels that are NaN": (UNET, {"block_out_channels": [NAN, NAN]}),
    "channels below 0": (UNET, {"block_out_channels": [-64, -128]}),
    "channels of 4,000 digits": (UNET, {"block_out_channels": [DIGITS, 128]}),
    "a million levels": (UNET, {"block_out_channels": [64] * 100_000}),
    "heads of 0": (UNET, {"attention_head_dim": 0}),
    "heads that do not divide": (UNET, {"attention_head_dim": 7}),
    "heads that are true": (UNET, {"attention_head_dim": True, "num_attention_heads": True}),
    "heads that are a fraction": (UNET, {"attention_head_dim": 2.5}),
    "groups of 0": (UNET, {"norm_num_groups": 0}),
    "groups that do not divide": (UNET, {"norm_num_groups": 7}),
    "depths of -20,000 and 20,000": (UNET, {"transformer_layers_per_block": [-20_000, 20_000]}),
    "20,000 blocks": (UNET, {"layers_per_block": 20_000}),
    "a depth of a billion": (UNET, {"transformer_layers_per_block": 10**9}),
    "a context below 0": (UNET, {"cross_attention_dim": -1}),
    "a context of other text towers": (UNET, {"cross_attention_dim": 128}),
    "8 channels": (UNET, {"in_channels": 8}),
    "5 channels": (UNET, {"in_channels": 5}),
    "7 channels": (UNET, {"in_channels": 7}),
    "8 channels out": (UNET, {"out_channels": 8}),
    "an unknown block": (UNET, {"down_block_types": ["\x1b[2JBlock", "DownBlock2D"]}),
    "other blocks on the way up": (UNET, {"up_block_types": ["UpBlock2D", "UpBlock2D"]}),
    "a size that is a dictionary": (UNET, {"sample_size": {"a": 1}}),
    "a size that is NaN": (UNET, {"sample_size": NAN}),
    "a size that is a text": (UNET, {"sample_size": "large"}),
    "a size of a billion": (UNET, {"sample_size": 10**9}),
    "an addition of 0": (UNET, {"projection_class_embeddings_input_dim": 0}),
    "an addition of another width": (UNET, {"projection_class_embeddings_input_dim": 128 + 6 * 256}),
    "a scaling of 0": (VAE, {"scaling_factor": -1.0}),
    "a scaling of NaN": (VAE, {"scaling_factor": NAN}),
    "a scaling of infinity": (VAE, {"scaling_factor": float("inf")}),
    "a scaling that is a list": (VAE, {"scaling_factor": [1]}),
    "16 latent channels": (VAE, {"latent_channels": 16}),
    "a shift": (VAE, {"shift_factor": 0.1}),
    "channels of the decoder that are a text": (VAE, {"block_out_channels": "wide"}),
    "a vocabulary of 0": (TEXT, {"vocab_size": 0}),
    "a smaller vocabulary than the tokenizer's": (TEXT, {"vocab_size": 100}),
    "a vocabulary of a trillion": (TEXT, {"vocab_size": 10**12}),
    "a window of -1": (TEXT, {"max_position_embeddings": -1}),
    "a smaller window than the tokenizer's": (TEXT, {"max_position_embeddings": 7}),
    "heads of a tower that do not divide": (TEXT, {"num_attention_heads": 7}),
    "a tower of a million layers": (TEXT, {"num_hidden_layers": 1_000_000}),
    "an activation that is a list": (TEXT, {"hidden_act": ["gelu"]}),
    "an end that no tokenizer has": (TEXT, {"eos_token_id": 5}),
    "an end that is NaN": (TEXT, {"eos_token_id": NAN}),
    "another epsilon": (TEXT, {"layer_norm_eps": 0.1}),
    "architectures that are a number": (TEXT, {"architectures": 5}),
    "a class of a list": (SCHEDULER, {"_class_name": ["EulerDiscreteScheduler"]}),
    "a class of escape codes": (SCHEDULER, {"_class_name": "\x1b]0;owned\x07"}),
    "betas that are a text": (SCHEDULER, {"beta_start": "0.00085"}),
    "betas that are NaN": (SCHEDULER, {"beta_start": NAN}),
    "betas above 1": (SCHEDULER, {"beta_end": 5}),
    "betas that are true": (SCHEDULER, {"beta_start": True}),
    "betas of 4,000 digits": (SCHEDULER, {"beta_end": DIGITS}),
    "an unknown beta schedule": (SCHEDULER, {"beta_schedule": ["linear"]}),
    "time steps of 1": (SCHEDULER, {"num_train_timesteps": 1}),
    "time steps of a trillion": (SCHEDULER, {"num_train_timesteps": 10**12}),
    "an offset of a text": (SCHEDULER, {"steps_offset": "1"}),
    "a spacing of a list": (SCHEDULER, {"timestep_spacing": [1]}),
    "betas one by one": (SCHEDULER, {"trained_betas": [0.1] * 1000}),
    "an index of numbers": (INDEX, {"unet": 5, "vae": 6}),
    "defaults of NaN": (INDEX, {"_fewstep": {"defaults": {"steps": NAN}}}),
    "defaults of a billion": (INDEX, {"_fewstep": {"defaults": {"steps": 10**9}}}),
    "a default that nobody knows": (INDEX, {"_fewstep": {"defaults": {"\x1b[2J": 1}}}),
    "a default sampler that nobody knows": (INDEX, {"_fewstep": {"defaults": {"sampler": "x" * 100_000}}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_of_models(model: Path, name: str) -> None:
    file, change = CHANGES[name]
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_refused(attempt(lambda: load_model(model, dtype=torch.float32)))


TEXTS = {
    "nothing": b"",
    "a byte": b"\x80",
    "a list": b"[]",
    "a number": b"5",
    "nested": b'{"a":' * 100_000,
    "no UTF-8": b'{"a":"\xff"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "digits": b'{"beta_start":' + b"9" * 5000 + b"}",
    "2 MB": b'{"a":"' + b"x" * 2_000_000 + b'"}',
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("file", [UNET, TEXT, SCHEDULER, INDEX, "tokenizer/tokenizer_config.json"])
def test_texts_of_settings(model: Path, file: str, name: str) -> None:
    (model / file).write_bytes(TEXTS[name])
    outcome = attempt(lambda: load_model(model, dtype=torch.float32))
    if (file, name) == ("tokenizer/tokenizer_config.json", "2 MB"):  # less than a vocabulary may have
        assert_cheap(outcome)
    else:
        assert_refused(outcome)


@pytest.mark.parametrize(
    "file", [UNET, SCHEDULER, INDEX, "tokenizer/tokenizer.json", "unet/diffusion_pytorch_model.safetensors"]
)
def test_pipes_and_folders_in_the_place_of_files(model: Path, file: str) -> None:
    (model / file).unlink()
    os.mkfifo(model / file)
    assert_refused(attempt(lambda: load_model(model, dtype=torch.float32)))
    (model / file).unlink()
    (model / file).mkdir()
    assert_refused(attempt(lambda: load_model(model, dtype=torch.float32)))


def test_notes_that_are_no_dictionary_are_none(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps(index | {"_fewstep": [1, 2]}))
    outcome = attempt(lambda: load_model(model, dtype=torch.float32))
    assert not outcome.kind, outcome.words


def test_a_shard_of_another_folder(model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "../\x1b[2J/etc/passwd"}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(attempt(lambda: load_model(model, dtype=torch.float32)))


VOCABULARIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "8,000 added tokens": lambda own: {
        "added_tokens_decoder": {str(10_000 + i): {"content": f"<{i}>"} for i in range(8000)}
    },
    "an added token of another id": lambda own: {"added_tokens_decoder": {"5": {"content": "<new>"}}},
    "an added token that is a number": lambda own: {"added_tokens_decoder": {"700": 5}},
    "an id that is a text": lambda own: {"added_tokens_decoder": {"many": {"content": "<new>"}}},
    "added tokens that are a list": lambda own: {"added_tokens_decoder": [1, 2]},
    "a window of a text": lambda own: {"model_max_length": "77"},
    "a window of -5": lambda own: {"model_max_length": -5},
    "a window that is true": lambda own: {"model_max_length": True},
    "an end that is a number": lambda own: {"eos_token": 5},
    "an end that is unknown": lambda own: {"eos_token": "\x1b[2J"},
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_settings_of_tokenizers(model: Path, name: str) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | VOCABULARIES[name](own)))
    assert_refused(attempt(lambda: Tokenizer.from_folder(path.parent)))


@pytest.mark.parametrize(
    "whole",
    [
        {"model": 5},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": "/etc/passwd", "merges": []}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 0, "b": 0}, "merges": []}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 2**40}, "merges": []}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 0}, "merges": [["a"], 5]}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 0}, "merges": ["a b c"]}},
        {"model": {"type": "Unigram", "vocab": []}},
    ],
)
def test_vocabularies(model: Path, whole: Any) -> None:
    (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    assert_refused(attempt(lambda: Tokenizer.from_folder(model / "tokenizer")))


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
ALPHA: dict[str, Any] = {"NaN": NAN, "infinity": float("inf")}


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": HUGE},
        {"lora_alpha": NAN},
        {"lora_alpha": "8"},
        {"lora_alpha": [8]},
        {"alpha_pattern": {"to_q": {"a": 1}}},
        {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_q": HUGE}},
    ],
)
def test_settings_of_loras(saved: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = load_model(saved / "sd1", dtype=torch.float32)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.zeros(4, 64),
        f"base_model.model.{name}.lora_B.weight": torch.zeros(64, 4),
    }
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    outcome = attempt(lambda: read_lora(tmp_path / "lora", model))
    if outcome.kind:
        assert_refused(outcome)
    assert_cheap(outcome)


@pytest.mark.parametrize("note", ["{", "[" * 100_000, "[]", "5", '{"lora_alpha": ' + "9" * 5000 + "}", "\x1b[2J"])
def test_notes_in_loras(saved: Path, tmp_path: Path, note: str) -> None:
    model = load_model(saved / "sd1", dtype=torch.float32)
    tensors = {f"{KEY}.lora_down.weight": torch.zeros(4, 64), f"{KEY}.lora_up.weight": torch.zeros(64, 4)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": note})
    assert_refused(attempt(lambda: read_lora(tmp_path / "lora.safetensors", model)))


# pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8), data: bytes | None = None) -> bytes:
    rows = zlib.compress(bytes(size[1] * (3 * size[0] + 1))) if data is None else data
    header = chunk(b"IHDR", struct.pack(">2I5B", *size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def noted(text: str) -> bytes:
    return png(chunk(b"iTXt", b"fewstep\0\0\0\0\0" + text.encode()))


PICTURES: dict[str, bytes] = {
    "nothing": b"",
    "a byte": b"\x80",
    "a signature": b"\x89PNG\r\n\x1a\n",
    "a cut picture": png()[:-30],
    "a bomb of pixels": png(size=(60_000, 60_000), data=zlib.compress(b"")),
    "no pixels": png(size=(0, 8)),
    "a broken chunk": png(b"\xff\xff\xff\xffiTXt"),
    "a GIF": b"GIF89a" + bytes(64),
    "a TIFF": b"II*\0" + bytes(64),
    "a picture in PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PICTURES[name])
    assert_refused(attempt(lambda: images.to_tensor(path)))


NOTES: dict[str, bytes] = {
    "no JSON": noted("{"),
    "a list": noted("[1]"),
    "nested": noted('{"a":' * 9_000),
    "digits": noted('{"seed": ' + "9" * 5000 + "}"),
    "70,000 letters": noted('{"prompt": "' + "x" * 70_000 + '"}'),
    "a bomb": png(chunk(b"zTXt", b"fewstep\0\0" + zlib.compress(bytes(100_000_000), 9))),
    "no UTF-8": png(chunk(b"iTXt", b"fewstep\0\0\0\0\0\xff\xfe{}")),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_pictures_say_of_themselves(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(NOTES[name])
    outcome = attempt(lambda: images.read_metadata(path) is None)
    if outcome.kind:
        assert_refused(outcome)
    assert_cheap(outcome)


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300)):
        assert_refused(attempt(lambda path=path: images.to_tensor(path)))
        assert_refused(attempt(lambda path=path: images.read_metadata(path)))


def test_more_data_than_a_picture_needs_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(data=zlib.compress(bytes(200_000_000), 9)))
    assert_cheap(attempt(lambda: images.to_tensor(tmp_path / "a.png")))


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_a_thousand_scans(tmp_path: Path, kind: str) -> None:
    """Each of a few bytes, each over all pixels; alone, and as the first of two in a file."""
    more = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]} if kind == "MPO" else {}
    Image.new("RGB", (4000, 4000)).save(tmp_path / "a.jpg", kind, progressive=True, **more)
    content = (tmp_path / "a.jpg").read_bytes()
    end = content.index(b"\xff\xd9")
    scan = content[content.rindex(b"\xff\xda", 0, end) : end]
    (tmp_path / "a.jpg").write_bytes(content[:end] + 1000 * scan + content[end:])
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == kind
    assert_refused(attempt(lambda: images.to_tensor(tmp_path / "a.jpg")))


def test_long_texts_beside_ours(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a" * 60_000 + "\nSteps: " + "9" * 60)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    outcome = attempt(lambda: images.read_metadata(tmp_path / "a.png"))
    assert not outcome.kind, outcome.words


# what is kept between starts


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{" * 100_000, b"\x80", b'{"a": ' + b"9" * 5000 + b"}", b"x" * 30_000_000]
)
def test_kept_choices_are_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cpu.json"
    path.write_bytes(content)
    outcome = attempt(lambda: Autotuner(path).run("a", {"one": lambda: torch.ones(1), "two": lambda: torch.ones(1)}))
    assert not outcome.kind, outcome.words
    assert_cheap(outcome)
    assert set(json.loads(path.read_text()).values()) <= {"one", "two"}


def test_a_pipe_in_the_place_of_kept_choices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cpu.json")
    outcome = attempt(lambda: Autotuner(tmp_path / "cpu.json").run("a", {"one": lambda: torch.ones(1)}))
    assert not outcome.kind, outcome.words
