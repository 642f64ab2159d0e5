"""Prepared folders and caches that somebody else made or broke: what does not fit is said and never followed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from fewstep.cli import main
from fewstep.data.cache import NOTE, CacheKey, open_cache, weights_digest, write_cache
from fewstep.data.filter_inputs import Settings
from fewstep.data.filters import Filter, read_blocklist
from fewstep.data.manifest import INDEX, MANIFEST
from fewstep.data.prepare import prepare
from fewstep.data.shards import open_shards
from fewstep.errors import CheckpointError, InputError
from fewstep.formats.tar_writer import TarWriter

RULE = Filter(min_size=16, min_aesthetic=None, max_watermark=None, max_unsafe=None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in two buckets."""
    folder = tmp_path_factory.mktemp("foreign")
    with (folder / "in.tar").open("wb") as file:
        tar = TarWriter(file)
        for i, size in enumerate([(64, 64), (96, 48), (64, 64)]):
            data = BytesIO()
            Image.new("RGB", size, (80 * i, 20, 20)).save(data, "PNG")
            tar.add(f"{i}.png", data.getvalue())
            tar.add(f"{i}.txt", f"picture {i}".encode())
        tar.end()
    prepare(
        [folder / "in.tar"], folder / "out", Settings(filter=RULE, side=64, step=16, encoding="png", max_hamming=None)
    )
    return folder / "out"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a nested one, except into `settings`, which nobody follows."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        if key != "settings":
            yield from places(inner, (*path, key))


JUNK = [None, -1, 2**80, 1.5, True, "", "\x1b[2J", [], {}, [[]], "../../etc/passwd", "a" * 5000]


def test_a_manifest_with_any_value_changed_is_read_or_refused_in_our_words(folder):
    whole = json.loads((folder / MANIFEST).read_text())
    words = []
    for path in places(whole):
        for junk in JUNK:
            changed = json.loads(json.dumps(whole))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            (folder / MANIFEST).write_text(json.dumps(changed))
            try:
                shards = open_shards(folder)
                shards.read(range(len(shards)))
                list(shards.damaged())
                assert main(["data", "inspect", str(folder)]) in (0, 3)
            except (CheckpointError, InputError) as error:
                words.append(str(error))
    assert len(words) > 300
    assert all(line.isprintable() and len(line) < 1000 for line in words)


@pytest.mark.parametrize(
    "text", ["[]", "1", '"a"', "[" * 100_000, '{"format": 1}', "{}", "\ud800", '{"format": 1, "x": 2}']
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="manifest"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", "..\\x.tar", "", ".tar", "x.tar\0"])
def test_a_shard_is_a_file_of_its_folder(folder, name):
    whole = json.loads((folder / MANIFEST).read_text())
    whole["shards"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="no file in it"):
        open_shards(folder)


Columns = dict[str, np.ndarray]
INDICES: dict[str, Callable[[Columns], Columns]] = {
    "a column that is missing": lambda c: {k: v for k, v in c.items() if k != "crc"},
    "a row too few": lambda c: {k: v[1:] for k, v in c.items()},
    "another number format": lambda c: c | {"start": c["start"].astype(np.float32)},
    "two dimensions": lambda c: c | {"start": c["start"][:, None]},
    "half a checksum": lambda c: c | {"sha256": c["sha256"][:, :16].copy()},
    "a negative start": lambda c: c | {"start": c["start"] * 0 - 1},
    "a start at the end of 64 bits": lambda c: c | {"start": c["start"] * 0 + (2**63 - 1)},
    "a length beyond the shard": lambda c: c | {"told_length": c["told_length"] * 0 + 2**62},
    "a shard that is not there": lambda c: c | {"shard": c["shard"] * 0 + 9},
    "a negative shard": lambda c: c | {"shard": c["shard"] * 0 - 1},
    "a bucket that is not there": lambda c: c | {"bucket": c["bucket"] * 0 + 9},
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_does_not_fit_is_refused(folder, name):
    save_file({k: np.ascontiguousarray(v) for k, v in INDICES[name](load_file(folder / INDEX)).items()}, folder / INDEX)
    whole = json.loads((folder / MANIFEST).read_text())
    whole["index"]["bytes"] = (folder / INDEX).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"index\.safetensors"):
        open_shards(folder)


TOLD = ["[]", "1", "[" * 50, "{}", '{"caption": 5}', '{"original_height": "a"}', '{"aesthetic": "high"}', "\x80\x80"]


@pytest.mark.parametrize("text", TOLD)
def test_what_is_told_of_a_picture_is_checked(folder, text):
    """Whoever made the folder made its checksums too."""
    index = load_file(folder / INDEX)
    shard = folder / "shards" / open_shards(folder).manifest.shards[int(index["shard"][0])]["name"]
    data = bytearray(shard.read_bytes())
    start, length = int(index["told_start"][0]), int(index["told_length"][0])
    if text.startswith('{"'):
        told = json.loads(bytes(data[start : start + length]))
        told = json.dumps({**{k: v for k, v in told.items() if k != "sha256"}, **json.loads(text)})
    else:
        told = text
    data[start : start + length] = told.encode("latin-1").ljust(length)
    shard.write_bytes(data)
    picture = bytes(data[int(index["start"][0]) :][: int(index["length"][0])])
    index["crc"][0] = crc32(bytes(data[start : start + length]), crc32(picture))
    save_file(index, folder / INDEX)
    with pytest.raises(CheckpointError, match=r"the metadata of picture 0 in .*\.tar"):
        open_shards(folder).read([0])


def test_a_picture_of_another_size_than_its_bucket_is_refused(folder):
    """Else pictures of two sizes would meet in one batch."""
    index = load_file(folder / INDEX)
    index["bucket"] = 1 - index["bucket"]
    save_file(index, folder / INDEX)
    with pytest.raises(CheckpointError, match="not of its bucket's size"):
        open_shards(folder).read([0])


KEY = CacheKey(weights="w" * 64, transform="t", data="d")


@pytest.mark.parametrize(
    ("tensors", "note", "message"),
    [
        ({"mean": torch.zeros(9, 4)}, None, "has not a row for each picture"),
        ({"mean": torch.zeros(())}, None, "has not a row for each picture"),
        ({"mean": torch.zeros(2, 4)}, "[]", "made with other weights"),
        ({"mean": torch.zeros(2, 4)}, '{"key": 5}', "made with other weights"),
        ({"mean": torch.zeros(2, 4)}, "[" * 100_000, "cannot be read"),
        ({"mean": torch.zeros(2, 4)}, '{"key": {"weights": "\\u001b[2J"}}', "made with other weights"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(folder, tmp_path, tensors, note, message):
    shards = open_shards(folder)
    list(write_cache(tmp_path / "c", shards, lambda indices: {"mean": torch.zeros(len(indices), 4)}, KEY))
    text = json.dumps({"key": vars(KEY), "sha256": weights_digest(tensors)}) if note is None else note
    chunk = next(p for p in sorted((tmp_path / "c").glob("chunk*")) if "0" in p.name)
    save_torch(tensors, chunk, metadata={NOTE: text})
    with pytest.raises(CheckpointError, match=message) as error:
        open_cache(tmp_path / "c", shards, KEY).read(range(3))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["[]", "5", '{"weights": ["w"]}', "{"])
def test_a_cache_without_a_sound_note_is_refused(folder, tmp_path, text):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cache.json").write_text(text)
    with pytest.raises(CheckpointError, match="c"):
        open_cache(tmp_path / "c", open_shards(folder), KEY)


def test_a_batch_of_nothing_is_refused(folder, tmp_path):
    for batch, share in ((0, (0, 1)), (-3, (0, 1)), (4, (1, 1)), (4, (0, 0))):
        with pytest.raises(InputError, match="batch"):
            next(write_cache(tmp_path / "c", open_shards(folder), lambda _: {}, KEY, batch=batch, share=share))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"settings": 1, "inputs": 2, "made_with": 3}', '{"made_with": {"zlib-ng": "2"}}']
)
def test_an_unfinished_folder_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "in.tar").write_bytes(bytes(1024))
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "plan.json").write_text(text)
    with pytest.raises(InputError, match="begun with other"):
        prepare([tmp_path / "in.tar"], tmp_path / "out", Settings(filter=RULE, side=64, step=16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_limit_that_is_no_number_is_refused(value):
    """Nothing is over NaN and nothing under it, so it would let all through."""
    for name in ("min_aesthetic", "max_watermark", "max_unsafe"):
        with pytest.raises(InputError, match=name):
            Filter(**{name: value})


def test_settings_that_cannot_be_are_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"max_hamming \(--near\) is 16"):
        Settings(max_hamming=16)
    with pytest.raises(InputError, match="near is no setting; it is max_hamming"):
        Settings(near=3)
    assert Settings(max_hamming=4).as_json()["near"] == 4  # the key of manifests
    with pytest.raises(InputError, match="side 1000000000 is over 8192"):
        Settings(side=10**9)


def test_a_byte_order_mark_hides_no_line_of_a_blocklist(tmp_path):
    digest = sha256(b"x").hexdigest()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + digest.encode())
    assert read_blocklist(tmp_path / "list.txt") == {digest}
