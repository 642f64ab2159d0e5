"""Prepared shards, read at any place in the same short time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from fewstep.data.buckets import Size
from fewstep.data.columns import Record
from fewstep.data.filters import Filter
from fewstep.data.manifest import INDEX, INDEX_TYPES, Index, Manifest, read_manifest
from fewstep.data.pictures import PictureError, decoded
from fewstep.errors import CheckpointError, InputError, printable, quoted
from fewstep.files import checksum

Indices = NDArray[np.int64]
SCORES = ("aesthetic", "watermark", "unsafe", "similarity")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture as it is trained on.

    image (3, H, W) uint8; `caption` may be empty. `original_size` (height, width) before it was resized, and `crop`
    (top, left) in the resized picture, are what SDXL is told. `scores`: those of aesthetic, watermark, unsafe and
    similarity that are known.
    """

    index: int
    image: Tensor
    caption: str
    original_size: tuple[int, int]
    crop: tuple[int, int]
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A prepared folder: its manifest, and a table of where every picture is. `open_shards` makes one."""

    folder: Path
    manifest: Manifest
    index: Index

    def __len__(self) -> int:
        return self.manifest.accepted

    @property
    def buckets(self) -> NDArray[np.int32]:
        """(N,): which of `manifest.sizes` each picture has."""
        return self.index["bucket"]

    def read(self, indices: Iterable[int]) -> list[Sample]:
        """The pictures with these numbers, in this order.

        Raises `InputError` for a number that is not there, and `CheckpointError`, naming the shard, if one is gone,
        cut short or damaged.
        """
        return [self._sample(int(i)) for i in indices]

    def captions(self, indices: Iterable[int]) -> list[str]:
        """The captions of these pictures, whose pixels are not decoded; raises as `read` does."""
        return [self._stored(int(i))[2].get("caption", "") for i in indices]

    def select(self, rule: Filter) -> Indices:
        """The numbers of the pictures that `rule` keeps, rising: a stricter rule than the one they were prepared by.

        Sizes are those before resizing; a blocklist knows a picture by the SHA-256 of the file it came from.
        """
        accepted = (i for i, record in enumerate(self._records()) if rule.rejection(record) is None)
        return np.fromiter(accepted, np.int64)

    def damaged(self) -> Iterator[str]:
        """What is wrong with the shards and the index, one line each, by their checksums; reads all bytes."""
        files = {f"shards/{each['name']}": each["sha256"] for each in self.manifest.shards}
        for name, digest in {**files, INDEX: self.manifest.index["sha256"]}.items():
            path = self.folder / name
            if not path.is_file():
                yield f"{path} is gone"
            elif checksum(path) != digest:
                yield f"{path} is not what the manifest says"

    def _records(self) -> Iterator[Record]:
        names = ("width", "height", "aesthetic", "watermark", "unsafe", "captioned")
        columns = (self.index[name].tolist() for name in names)
        for width, height, *scores, captioned, digest in zip(*columns, self.index["sha256"], strict=True):
            aesthetic, watermark, unsafe = (None if isnan(score) else score for score in scores)
            yield Record(
                caption="said" if captioned else None,
                width=width,
                height=height,
                aesthetic=aesthetic,
                watermark=watermark,
                unsafe=unsafe,
                hashes=(digest.tobytes().hex(),),
            )

    def _sample(self, i: int) -> Sample:
        stored = self._stored(i)
        return _as_sample(i, self.manifest.sizes[self.buckets[i]], *stored)

    def _stored(self, i: int) -> tuple[Path, bytes, dict[str, Any]]:
        """The shard that holds picture `i`, the picture's file, and its metadata."""
        if not 0 <= i < len(self):
            raise InputError(f"there is no picture {i}; {self.folder} holds 0 to {len(self) - 1}")
        path = self.folder / "shards" / self.manifest.shards[self.index["shard"][i]]["name"]
        picture, metadata = _bytes(
            path, [int(self.index[n][i]) for n in ("start", "length", "told_start", "told_length")]
        )
        if crc32(metadata, crc32(picture)) != self.index["crc"][i]:
            raise CheckpointError(
                f"picture {i} in {path} is damaged; prepare the folder again, or bring the shard back"
            )
        return path, picture, _metadata(path, i, metadata)


def open_shards(folder: str | Path) -> Shards:
    """The shards in a folder that `prepare` made.

    Raises `InputError` for a folder that is none or not finished, `CheckpointError` if a shard is gone or has
    another size than it should.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        if not re.fullmatch(r"[\w-]+\.tar", shard["name"]):
            raise CheckpointError(f"{folder} names a shard {quoted(shard['name'])}, which is no file in it")
        _require_size(folder / "shards" / shard["name"], shard["bytes"])
    path = folder / INDEX
    _require_size(path, manifest.index["bytes"])
    try:
        index = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {printable(str(error))}; prepare the folder again") from error
    _require_rows(path, index, manifest)
    return Shards(folder=folder, manifest=manifest, index=index)


def stacked_images(samples: Sequence[Sample]) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1] of samples of one size."""
    return torch.stack([sample.image for sample in samples]).float() / 127.5 - 1


def _require_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is gone; bring it back, or prepare the folder again")
    if path.stat().st_size != size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes where {size:,} were written; bring it back, or prepare it again"
        )


def _require_rows(path: Path, index: Index, manifest: Manifest) -> None:
    """Refuse an index whose columns are not there, or that points out of the shards."""
    shapes = {name: ((manifest.accepted,), kind) for name, kind in INDEX_TYPES.items()}
    for name, (shape, kind) in (shapes | {"sha256": ((manifest.accepted, 32), np.uint8)}).items():
        if name not in index:
            raise CheckpointError(f"{path} has no column {name!r}; prepare the folder again")
        if index[name].shape != shape or index[name].dtype != kind:
            found = f"{index[name].dtype} {index[name].shape}"
            raise CheckpointError(f"{path} has a column {name!r} of {found}, not {shape}; prepare the folder again")
    sizes = np.array([shard["bytes"] for shard in manifest.shards], np.int64)
    start, length, metadata, end = (index[name] for name in ("start", "length", "told_start", "told_length"))
    inside = (index["bucket"] >= 0) & (index["bucket"] < len(manifest.buckets))
    inside &= (index["shard"] >= 0) & (index["shard"] < len(sizes))
    if inside.all():
        inside &= (start >= 0) & (length >= 0) & (length <= metadata - start) & (end >= 0)
        inside &= end <= sizes[index["shard"]] - metadata if len(inside) else inside
    if not inside.all():
        raise CheckpointError(f"{path} says that picture {int(inside.argmin())} is where no shard is; prepare it again")


def _bytes(path: Path, places: Sequence[int]) -> tuple[bytes, bytes]:
    """A picture's file and its JSON, at their starts and lengths. Opened each time: a descriptor survives no fork."""
    start, length, metadata_start, metadata_length = places
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            whole = file.read(metadata_start + metadata_length - start)
    except OSError as error:
        raise CheckpointError(
            f"the shard {path} cannot be read any more ({error.strerror}); bring it back and start again: "
            "the run goes on from its last checkpoint"
        ) from error
    return whole[:length], whole[metadata_start - start :]


def _metadata(path: Path, i: int, data: bytes) -> dict[str, Any]:
    """The metadata of picture `i`: its caption, if there is one, is a text, and sizes and scores are numbers."""
    try:
        metadata = json.loads(data)
        numbers = [metadata[name] for name in ("original_height", "original_width", "crop_top", "crop_left")]
        sound = isinstance(metadata.get("caption", ""), str) and all(type(number) is int for number in numbers)
        sound = sound and all(isinstance(metadata[name], int | float) for name in SCORES if name in metadata)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the metadata of picture {i} in {path} makes no sense; prepare the folder again"
        ) from error
    if not sound:
        raise CheckpointError(f"the metadata of picture {i} in {path} is of other kinds; prepare the folder again")
    return dict(metadata)


def _as_sample(i: int, size: Size, path: Path, picture: bytes, metadata: dict[str, Any]) -> Sample:
    try:
        pixels = np.array(decoded(picture))
    except PictureError as error:
        raise CheckpointError(f"picture {i} in {path} cannot be decoded; prepare the folder again") from error
    if pixels.shape[:2] != (size.height, size.width):
        raise CheckpointError(f"picture {i} in {path} is not of its bucket's size; prepare the folder again")
    return Sample(
        index=i,
        image=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
        caption=metadata.get("caption", ""),
        original_size=(metadata["original_height"], metadata["original_width"]),
        crop=(metadata["crop_top"], metadata["crop_left"]),
        scores={name: metadata[name] for name in SCORES if name in metadata},
    )
