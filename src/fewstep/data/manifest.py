"""What a prepared folder is made of: where every picture of the inputs went, and how its shards are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features
from safetensors.numpy import save

from fewstep.data.buckets import Size
from fewstep.errors import CheckpointError, InputError, quoted
from fewstep.files import atomic_write, read_json, write_json

MANIFEST, INDEX, SUCCESS, REJECTED = "manifest.json", "index.safetensors", "_SUCCESS", "rejected.csv"
WORK = ".work"
"""What is not finished yet: reports and pictures of the first pass."""
FORMAT = 1
RULES = "2"  # by which members of a tar become samples; another number for every change
Index = Mapping[str, NDArray[Any]]

INDEX_TYPES: dict[str, type] = {
    "shard": np.int32,
    "bucket": np.int32,
    "start": np.int64,
    "length": np.int64,
    "told_start": np.int64,
    "told_length": np.int64,
    "crc": np.uint32,
    "width": np.int32,
    "height": np.int32,
    "aesthetic": np.float64,
    "watermark": np.float64,
    "unsafe": np.float64,
    "captioned": np.uint8,
}
"""The columns of an index, one row a picture, beside `sha256` (N, 32) of bytes. NaN: the collection does not say."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The account of a preparation; `samples` is `accepted` and all of `rejected` together.

    `made_with` and `settings` decide the bytes of the shards. `inputs`: name, bytes, samples, members and damage of
    each. `members`: how many members of the inputs are part of pictures, and how many for each reason are part of none;
    together all that were seen.
    `buckets`: width, height and samples of each size that is used. `shards`: name, bucket, samples, bytes, sha256.
    """

    format: int
    made_with: Mapping[str, str]
    settings: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    samples: int
    accepted: int
    rejected: Mapping[str, int]
    buckets: Sequence[Mapping[str, int]]
    shards: Sequence[Mapping[str, Any]]
    index: Mapping[str, Any]
    members: Mapping[str, int] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The size of each bucket."""
        return tuple(Size(bucket["width"], bucket["height"]) for bucket in self.buckets)

    @property
    def damaged(self) -> dict[str, str]:
        """The inputs of which something could not be read, and what."""
        return {each["name"]: each["damage"] for each in self.inputs if each["damage"]}

    @property
    def digest(self) -> str:
        """64 hex digits that name the prepared data, whatever folder they are in."""
        shards = "\n".join(str(shard["sha256"]) for shard in self.shards)
        return sha256(f"{shards}\n{self.index['sha256']}".encode()).hexdigest()


def made_with() -> dict[str, str]:
    """The versions that decide what a shard's bytes are: Pillow's, its codecs', and that of the rules of reading."""
    codecs = {name: str(features.version_codec(name)) for name in ("jpg", "zlib")}
    return {"pillow": PIL.__version__, **codecs, "webp": str(features.version_module("webp")), "rules": RULES}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder. `InputError` if it is none, or not finished; `CheckpointError` if damaged."""
    if not (folder / SUCCESS).is_file():
        if (folder / WORK).is_dir():
            raise InputError(f"{folder} is not finished yet; give the command again that began it")
        raise InputError(f"{folder} is no folder of prepared shards; make one with `fewstep data prepare`")
    values = read_json(folder / MANIFEST)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} is not of format {FORMAT}; prepare the folder again")
    wrong = [name for name, shape in _SHAPES.items() if not _fits(values.get(name, {}), shape)]
    if wrong or values.keys() - _SHAPES.keys():
        names = quoted(wrong[0] if wrong else min(values.keys() - _SHAPES.keys()))
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {names} is not what it should be; prepare it again")
    return Manifest(**values)


_COUNTS = {str: int}
_SHAPES: dict[str, Any] = {
    "format": int,
    "made_with": {str: str},
    "settings": {str: object},
    "inputs": [{"name": str, "bytes": int, "samples": int, "damage": (str, NoneType)}],
    "samples": int,
    "accepted": int,
    "rejected": _COUNTS,
    "buckets": [{"width": int, "height": int, "samples": int}],
    "shards": [{"name": str, "samples": int, "bytes": int, "sha256": str}],
    "index": {"bytes": int, "sha256": str},
    "members": _COUNTS,
}
"""What the values in a manifest are; integers are 0 or more. A dictionary of a type holds any names."""


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(each, shape[0]) for each in value)
    if isinstance(shape, dict) and str in shape:
        return isinstance(value, dict) and all(_fits(each, shape[str]) for each in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), each) for name, each in shape.items())
    if shape is int:
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, shape)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder, and the sign that it is whole."""
    write_json(folder / MANIFEST, asdict(manifest))
    with atomic_write(folder / SUCCESS) as file:
        file.write(manifest.digest.encode() + b"\n")


def write_index(path: Path, rows: Mapping[str, Sequence[Any]], hashes: Sequence[str]) -> dict[str, Any]:
    """Write the columns `rows` and the SHA-256 of each picture's file; the index's bytes and checksum."""
    columns: dict[str, NDArray[Any]] = {}
    for name, kind in INDEX_TYPES.items():
        columns[name] = np.array([float("nan") if value is None else value for value in rows[name]], kind)
    digests = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)
    data = save({**columns, "sha256": digests})
    with atomic_write(path) as file:
        file.write(data)
    return {"bytes": len(data), "sha256": sha256(data).hexdigest()}
