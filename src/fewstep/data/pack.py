"""The second pass: the chosen pictures written into tar files that any webdataset reader takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from fewstep.files import atomic_write, write_json
from fewstep.formats.tar_writer import TarWriter


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Where a chosen picture lies: the lengths of its file, its JSON and its caption, which follow each other."""

    source: Path
    start: int
    parts: tuple[int, int, int]

    def read(self) -> tuple[bytes, bytes, bytes]:
        """The picture, the JSON and the caption."""
        with self.source.open("rb") as file:
            file.seek(self.start)
            picture, metadata, caption = (file.read(length) for length in self.parts)
        return picture, metadata, caption


@dataclass(frozen=True, kw_only=True)
class PackTask:
    """A shard to write at `shard`, its pictures called by their numbers from `first` on; the report to `output`."""

    pieces: Sequence[ByteRange]
    shard: Path
    first: int
    suffix: str
    output: Path


def pack(task: PackTask) -> None:
    """Write one shard and a report: its bytes, its checksum, and where each picture and its JSON are.

    A row of `members` is the picture's start and length, the JSON's start and length, and the CRC-32 of both.
    """
    with atomic_write(task.shard) as file:
        writer = TarWriter(file)
        members = list(_written(task, writer))
        writer.end()
    write_json(task.output, {"bytes": writer.size, "sha256": writer.digest.hexdigest(), "members": members})


def _written(task: PackTask, writer: TarWriter) -> Iterator[list[int]]:
    for number, piece in enumerate(task.pieces, task.first):
        picture, metadata, caption = piece.read()
        start = writer.add(f"{number:09d}.{task.suffix}", picture)
        metadata_start = writer.add(f"{number:09d}.json", metadata)
        writer.add(f"{number:09d}.txt", caption)
        yield [start, len(picture), metadata_start, len(metadata), crc32(metadata, crc32(picture))]
