"""Six doors for files from anywhere, and thousands of damaged files at each: read, or refused in our own words.

FEWSTEP_FUZZ_INPUTS says how many inputs a door gets, FEWSTEP_FUZZ_START the number of the first one. A failure names
the number of its input: `FEWSTEP_FUZZ_INPUTS=1 FEWSTEP_FUZZ_START=<number> pytest tests/fuzz -k <door>` reads it again.
"""

# ruff: noqa: E501

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from fewstep import images
from fewstep.data.sources import DamageError, samples
from fewstep.errors import CheckpointError, InputError
from fewstep.formats.unpickle import Interpreter
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.models.zoo import CLIP_L, SD_AUTOENCODER
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.folder import parsed
from fewstep.weights.load import open_tensors
from fewstep.weights.scheduler import SchedulerConfig
from tests.factories import tokenizer, unet_config

INPUTS = int(os.environ.get("FEWSTEP_FUZZ_INPUTS", "10000"))
START = int(os.environ.get("FEWSTEP_FUZZ_START", "0"))
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J",
    "\ud800",
)
WORDS = (b"\x80\x02", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"ustar", b"fewstep", b"{", b"}", b"[", b'"', b"\0", b"\xff", b"NaN", b"9" * 30)  # fmt: skip


def mutated(random: Random, seed: bytes, others: list[bytes]) -> bytes:
    """`seed` with a few bytes, numbers or pieces changed."""
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        at = random.randrange(len(data) + 1)
        length = min(random.choice((1, 2, 4, 8, 30, 300)), len(data) - at)
        match random.randrange(9):
            case 0 | 1 if length:
                data[at] ^= 1 << random.randrange(8)
            case 2 if length:
                data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 3:
                kind = random.choice(("<H", "<L", "<Q", ">L"))
                number = random.choice(NUMBERS) & (256 ** struct.calcsize(kind) - 1)
                data[at : at + struct.calcsize(kind)] = struct.pack(kind, number)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                data[at:at] = random.choice(WORDS)
            case 7:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                data[at : at + length] = other[start : start + length]
            case _:
                del data[at : at + 1 if random.random() < 0.8 else None]
    return bytes(data)


def changed(random: Random, value: Any) -> Any:
    """`value`, some part of which has become another one."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: changed(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        return [*value[:at], changed(random, value[at]), *value[at + random.randrange(2) :]]
    other = random.choice((*VALUES, [], {}, [value], {"a": value}, [value] * 50))
    return -other if isinstance(other, int | float) and random.random() < 0.3 else other


def archived(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pictured() -> bytes:
    buffer, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    notes.add_itxt("fewstep", json.dumps({"prompt": "a red cube", "seed": 5, "size": [64, 64]}))
    notes.add_text(
        "parameters",
        "a red cube\nNegative prompt: blue\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 3, Size: 64x64",
    )
    Image.new("RGB", (16, 8), "red").save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (
            ("a.png", pictured()),
            ("a.txt", b"a red cube"),
            ("b/\u00e4.jpg", b"x"),
            ("b/\u00e4.json", b'{"caption": 5}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = {
    "unet": (UNetConfig.from_diffusers, unet_config("sdxl").to_diffusers(8)),
    "vae": (AutoencoderConfig.from_diffusers, SD_AUTOENCODER.to_diffusers(64)),
    "text": (TextConfig.from_transformers, CLIP_L.to_transformers()),
    "scheduler": (SchedulerConfig.from_diffusers, SchedulerConfig().to_diffusers()),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save(folder)
    (folder / "tokenizer.json").unlink()
    return folder


def each_input(read: Callable[[Random], object]) -> None:
    """`read`, with a source of random numbers for each input; only our own errors may leave it."""
    for number in range(START, START + INPUTS):
        try:
            read(Random(number))
        except (CheckpointError, InputError):
            continue
        except BaseException as error:
            pytest.fail(f"input {number}: {type(error).__name__}: {error!s:.300}")


def read_tensors(path: Path) -> None:
    file = open_tensors(path)
    for name in file.shapes:
        file.read(name, True).sum()
        file.read(name, False)


def test_safetensors(tmp_path: Path) -> None:
    seeds, path = [save(TENSORS), save(TENSORS, {"format": "pt"})], tmp_path / "model.safetensors"

    def read(random: Random) -> None:
        path.write_bytes(mutated(random, random.choice(seeds), seeds))
        read_tensors(path)

    each_input(read)


def test_torch_archives(tmp_path: Path) -> None:
    seeds, path = [archived(TENSORS), archived({"state_dict": TENSORS, "global_step": 5})], tmp_path / "model.ckpt"

    def read(random: Random) -> None:
        path.write_bytes(mutated(random, random.choice(seeds), seeds))
        read_tensors(path)

    each_input(read)


def test_pickles(tmp_path: Path) -> None:
    """In archives whose checksums are right."""
    path, seeds = tmp_path / "model.ckpt", []
    for content in (TENSORS, {"state_dict": TENSORS, "global_step": 5}):
        with zipfile.ZipFile(io.BytesIO(archived(content))) as archive:
            seeds.append(archive.read("archive/data.pkl"))

    def read(random: Random) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", mutated(random, random.choice(seeds), seeds))
            archive.writestr("archive/data/0", bytes(24))
            archive.writestr("archive/data/1", bytes(8))
        read_tensors(path)

    each_input(read)
    assert Interpreter().run(seeds[0])


def test_settings(tmp_path: Path, vocabulary: Path) -> None:
    """Of networks, schedulers and tokenizers: JSON, now and then damaged as a text too."""
    path, words = tmp_path / "config.json", vocabulary / "tokenizer_config.json"
    own = json.loads(words.read_text())

    def read(random: Random) -> None:
        name = random.choice((*SETTINGS, "tokenizer"))
        parse, settings = SETTINGS.get(name, (None, own))
        for _ in range(random.choice((1, 1, 2, 4))):
            settings = changed(random, settings)
        text = json.dumps(settings).encode()
        text = mutated(random, text, [text]) if random.random() < 0.2 else text
        (path if parse else words).write_bytes(text)
        if parse is None:
            Tokenizer.from_folder(vocabulary).encode("a red cube")
        else:
            parsed(path, parse)

    each_input(read)


def test_pictures(tmp_path: Path) -> None:
    path, seeds = tmp_path / "a.png", [pictured()]
    for kind in ("JPEG", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 8), "red").save(buffer, kind)
        seeds.append(buffer.getvalue())

    def read(random: Random) -> None:
        path.write_bytes(mutated(random, random.choice((seeds[0], seeds[0], *seeds)), seeds))
        images.read_metadata(path)
        images.to_tensor(path)

    each_input(read)


def test_collections(tmp_path: Path) -> None:
    path, seeds = tmp_path / "a.tar", [tarred()]

    def read(random: Random) -> None:
        path.write_bytes(mutated(random, seeds[0], seeds))
        try:
            list(samples(path))
        except DamageError:
            return

    each_input(read)
