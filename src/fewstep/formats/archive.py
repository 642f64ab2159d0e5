"""Zip archives as torch writes them: stored plainly, one member behind the other, and one directory that all agree on.

A zip file can hold two directories, members that overlap, and names and sizes that differ between a member and the
directory, so that two readers see two files. Here is one reader, and it refuses what another might read otherwise.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fewstep.errors import CheckpointError, quoted

MOST_MEMBERS = 10_000
LARGEST_NAME = 500  # bytes

_END = struct.Struct("<4s4H2LH")  # signature, disks, members here and in all, size and place of the directory, comment
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF  # the number is in the extra field


class Member(NamedTuple):
    """Where a file of the archive lies: `start` and `size` in bytes, `crc` its checksum."""

    name: str
    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    name: bytes
    flags: int
    crc: int
    size: int
    place: int


def read_directory(path: Path) -> dict[str, Member]:
    """The members of a zip archive by their names; CheckpointError for one that is broken, or that lies."""
    try:
        with path.open("rb") as file:
            place, size, count = _directory(file)
            file.seek(place)
            entries = _entries(file.read(size), count)
            entries.sort(key=lambda entry: entry.place)
            members = [_member(file, entry) for entry in entries]
    except (struct.error, UnicodeDecodeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is a broken or cut zip archive ({error}); download it again") from error
    spans = [(entry.place, member.start + member.size) for entry, member in zip(entries, members, strict=True)]
    _check_apart(path, spans, place)
    if len(found := {member.name: member for member in members}) < len(members):
        raise CheckpointError(f"{path} holds two files of one name; download it again")
    return found


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of a member; CheckpointError if they are not those that were written."""
    with path.open("rb") as file:
        file.seek(member.start)
        content = file.read(member.size)
    if zlib.crc32(content) != member.crc:
        raise CheckpointError(f"{path}: {quoted(member.name)} is damaged; download the file again")
    return content


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Place and size of the directory, which must end where the records behind it begin, and its number of members."""
    end = file.seek(-_END.size, 2)
    magic, disk, _, here, count, size, place, comment = _END.unpack(file.read(_END.size))
    if magic != b"PK\x05\x06" or comment or disk or here != count:
        raise ValueError("its end record is missing")
    behind = end
    if end >= _LOCATOR.size:
        file.seek(end - _LOCATOR.size)
        locator, _, at, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if locator == b"PK\x06\x07":
            file.seek(at)
            magic, _, _, _, _, _, here, all64, size64, place64 = _END64.unpack(file.read(_END64.size))
            stated = [(count, all64, 0xFFFF), (size, size64, _FULL), (place, place64, _FULL)]
            apart = file.tell() != end - _LOCATOR.size or here != all64
            if magic != b"PK\x06\x06" or apart or any(a not in (b, full) for a, b, full in stated):
                raise ValueError("its two end records disagree")
            behind, count, size, place = at, all64, size64, place64
    if count > MOST_MEMBERS:
        raise ValueError(f"{count} entries; a checkpoint has at most {MOST_MEMBERS}")
    if place + size != behind or size > count * (_ENTRY.size + 2 * LARGEST_NAME):
        raise ValueError("its directory is not where it should be")
    return place, size, count


def _entries(directory: bytes, count: int) -> list[_Entry]:
    entries, at = [], 0
    for _ in range(count):
        magic, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, _, place = _ENTRY.unpack_from(
            directory, at
        )
        at += _ENTRY.size
        label, more = directory[at : at + name], directory[at + name : at + name + extra]
        at += name + extra + comment
        if _FULL in (packed, size, place):
            size, packed, place = _wide(more, size, packed, place)
        if magic != b"PK\x01\x02" or name > LARGEST_NAME or at > len(directory):
            raise ValueError("its directory is damaged")
        if method or flags & 1:
            raise ValueError(f"{quoted(label)} is compressed or encrypted; torch stores plainly")
        if packed != size:
            raise ValueError(f"{quoted(label)} has {packed:,} bytes and unpacks to {size:,}: a zip bomb")
        entries.append(_Entry(label, flags, crc, size, place))
    if at != len(directory):
        raise ValueError("its directory is damaged")
    return entries


def _wide(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those that do not fit 32 bits from the extra field of 64-bit archives."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, -1) if number == _FULL else number for number in numbers]
        at += 4 + length
    raise ValueError("its directory is damaged")


def _member(file: BinaryIO, entry: _Entry) -> Member:
    """The member behind its own header, which must say what the directory says."""
    file.seek(entry.place)
    magic, _, flags, method, _, _, crc, _, size, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    same = (magic, flags, method, file.read(name)) == (b"PK\x03\x04", entry.flags, 0, entry.name)
    later = entry.flags & 8  # checksum and size stand behind the data
    if not same or not (later or (crc == entry.crc and size in (entry.size, _FULL))):
        raise ValueError(f"{quoted(entry.name)} is not what the directory says")
    text = entry.name.decode("utf-8" if entry.flags & 0x800 else "ascii")
    if ".." in text.split("/") or text.startswith("/") or "\\" in text or "\0" in text:
        raise ValueError(f"{quoted(text)} is a name that leaves its folder")
    return Member(text, entry.place + _LOCAL.size + name + extra, entry.size, entry.crc)


def _check_apart(path: Path, spans: list[tuple[int, int]], directory: int) -> None:
    """CheckpointError unless the first member begins the file and none reaches into the next one."""
    reaches = any(end > start for (_, end), (start, _) in pairwise([*spans, (directory, directory)]))
    if spans and (spans[0][0] != 0 or reaches):
        raise CheckpointError(f"{path} is a zip archive whose files overlap or have something before them")
