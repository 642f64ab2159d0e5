"""The first pass: reads one input, crops its accepted pictures to their buckets, lists the others by reason."""

from __future__ import annotations

import json
from dataclasses import InitVar, dataclass, field, replace
from hashlib import md5, sha256
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.data.buckets import Size, bucket_sizes, nearest_bucket
from fewstep.data.columns import Record
from fewstep.data.duplicates import Deduplicator
from fewstep.data.filters import Filter, Reason
from fewstep.data.pictures import ENCODINGS, Encoding, PictureError, decoded, encoded, fitted, perceptual_hash
from fewstep.data.raw import DamageError, Leftover, RawSample
from fewstep.data.sources import samples
from fewstep.errors import InputError, unknown
from fewstep.files import atomic_write, write_json

Json = dict[str, Any]
_ABSENT = object()
PART = "part_of_a_picture"
MOST_LISTED = 10_000  # members of an input that are part of no picture, by name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is made of a collection: which pictures stay, how large they become, how they are stored.

    `side`: pictures get about `side` x `side` pixels, in buckets whose sides are multiples of `step`; None takes the
    filter's `min_size`, so that none has to grow. `max_hamming`: the largest
    Hamming distance, of 128 bits, between the perceptual hashes of near duplicates; None drops equal files alone.
    `per_shard`: the most pictures in a shard.
    """

    filter: Filter = field(default_factory=Filter)
    side: int | None = None
    step: int = 64
    encoding: Encoding = "jpeg"
    max_hamming: int | None = 3
    per_shard: int = 10_000
    near: InitVar[object] = _ABSENT

    def __post_init__(self, near: object) -> None:
        if near is not _ABSENT:
            raise InputError("near is no setting; it is max_hamming")
        if self.encoding not in ENCODINGS:
            raise InputError(unknown("encoding", self.encoding, ENCODINGS))
        if self.per_shard < 1:
            raise InputError(f"per_shard is {self.per_shard}; a shard needs at least 1 picture")
        Deduplicator(self.max_hamming)  # refuses more bits than can differ
        bucket_sizes(self._square(), self.step)  # refuses a side that no step divides

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The buckets."""
        return bucket_sizes(self._square(), self.step)

    def _square(self) -> int:
        side = self.side if self.side is not None else self.filter.min_size
        if side is None:
            raise InputError("side is not given, and the filter has no min_size to take it from; give one of them")
        return side

    def as_json(self) -> Json:
        """The settings in full, as they stand in a manifest, where `max_hamming` has the key "near"."""
        stored = {"near" if name == "max_hamming" else name: value for name, value in vars(self).items()}
        return stored | {"filter": self.filter.settings(), "sizes": [list(size) for size in self.sizes]}


@dataclass(frozen=True, kw_only=True)
class FilterTask:
    """The input `source`, whose report goes to `output`, and its pictures beside that into a file `.pictures`."""

    source: Path
    output: Path


def filter_input(settings: Settings, task: FilterTask) -> None:
    """Read one input; write its accepted pictures, and a report.

    The report, JSON, holds `kept`: one head for each accepted picture, see `_stored_sample`; `rejected`: [key, reason]
    of the others; `members`: how many members of the input are part of pictures, and of the others how many for each
    reason; `unused`: [name, reason] of up to 10,000 of these; `damage`: what could not be read, or null.
    """
    report: Json = {"kept": [], "rejected": [], "members": {PART: 0}, "unused": [], "damage": None}
    with atomic_write(task.output.with_suffix(".pictures")) as file:
        try:
            for sample in samples(task.source):
                if isinstance(sample, Leftover):
                    _count_leftover(sample, report)
                else:
                    _store(sample, settings, file, report)
        except DamageError as error:
            report["damage"] = str(error)
        except MemoryError as error:
            raise MemoryError(f"there is too little memory to read {task.source}; take fewer processes") from error
    write_json(task.output, report)


def _count_leftover(leftover: Leftover, report: Json) -> None:
    members = report["members"]
    members[leftover.reason.value] = members.get(leftover.reason.value, 0) + 1
    if len(report["unused"]) < MOST_LISTED:
        report["unused"].append([leftover.name, leftover.reason.value])


def _store(sample: RawSample, settings: Settings, file: BinaryIO, report: Json) -> None:
    report["members"][PART] += sample.members
    try:
        head, parts = _stored_sample(sample, settings)
    except PictureError as error:
        report["rejected"].append([sample.record.key, error.reason.value])
        return
    report["kept"].append(head | {"start": file.tell(), "parts": [len(part) for part in parts]})
    file.write(b"".join(parts))


def _stored_sample(sample: RawSample, settings: Settings) -> tuple[Json, tuple[bytes, bytes, bytes]]:
    """The head of a good picture, and what is stored of it: picture, JSON, caption. `PictureError` for another."""
    if sample.fault:
        raise PictureError(sample.fault)
    data = sample.picture or b""
    hashes = (sha256(data).hexdigest(), md5(data, usedforsecurity=False).hexdigest())
    record = replace(sample.record, hashes=(*sample.record.hashes, *(hashes if sample.picture is not None else ())))
    _refuse(settings.filter.rejection(record))
    _refuse(Reason.NO_PICTURE if sample.picture is None else None)
    picture = decoded(data)
    record = replace(record, width=picture.width, height=picture.height)
    _refuse(settings.filter.rejection(record))
    bucket = nearest_bucket(*picture.size, settings.sizes)
    cut, crop = fitted(picture, settings.sizes[bucket])
    head = {"bucket": bucket, "sha256": hashes[0], "looks": f"{perceptual_hash(picture):032x}"}
    text = _metadata(record) | {"crop_top": crop[0], "crop_left": crop[1], "sha256": hashes[0]}
    metadata = json.dumps(text, ensure_ascii=False).encode()
    return head | _scores(record), (encoded(cut, settings.encoding), metadata, (record.caption or "").encode())


def _refuse(reason: Reason | None) -> None:
    if reason is not None:
        raise PictureError(reason)


def _scores(record: Record) -> Json:
    """What a filter looks at, and the key."""
    names = ("key", "width", "height", "aesthetic", "watermark", "unsafe")
    return {name: getattr(record, name) for name in names} | {"captioned": record.caption is not None}


def _metadata(record: Record) -> Json:
    """What is known of a picture, under names that `columns` reads again."""
    names = ("key", "caption", "url", "aesthetic", "watermark", "unsafe", "similarity")
    known = {name: getattr(record, name) for name in names if getattr(record, name) is not None}
    return known | {"original_width": record.width, "original_height": record.height}
