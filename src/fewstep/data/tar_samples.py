"""The pictures of a tar file with their captions, wherever in it both stand, and an account of every member.

Two passes: one over the headers, which keeps names and places and no contents, and one over the samples. Members
belong together that have one name up to the last dot, `photo.v1.jpg` and `photo.v1.txt`. In the webdataset manner a
name ends at its first dot: `000.seg.png` beside a sample `000` is a further member of it, unless it has a caption or
JSON under its own name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fewstep.data.columns import Record, clean_caption, completed, decoded_text, record_from
from fewstep.data.filters import Reason
from fewstep.data.raw import LARGEST_PICTURE_FILE, LARGEST_TEXT, Damage, Leftover, RawSample, Unused
from fewstep.data.tar_reader import Kind, TarMember, TarReader

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "caption")
_TEXTS = (*CAPTIONS, "json")
_UNUSED = {
    Kind.FOLDER: Unused.FOLDER,
    Kind.LINK: Unused.LINK,
    Kind.SPECIAL: Unused.SPECIAL,
    Kind.DAMAGED: Unused.DAMAGED_HEADER,
}


class _Part(NamedTuple):
    kind: str
    start: int
    size: int
    whole: bool


class _Sample(NamedTuple):
    key: str
    parts: tuple[_Part, ...]
    fault: Reason | None


Groups = dict[str, list[_Part]]
TableRecords = Mapping[str, Record]


def tar_samples(path: Path, table: TableRecords, damage: Damage) -> Iterator[RawSample | Leftover]:
    """First the members of the tar that are part of no picture, then its pictures, in the order in which each begins.

    `table`: what a table beside it says, by key. What cannot be read is added to `damage`. Memory: the names, and one
    sample at a time.
    """
    try:
        with path.open("rb") as file:
            groups: Groups = {}
            yield from _grouped(TarReader(file, damage), groups)
            yield from _set_apart(groups, table)
            found = _samples(groups)
            rows = _table_rows(found, table, damage)
            for sample in found:
                yield from _further(sample)
                yield _raw_sample(file, sample, rows.get(sample.key, Record()))
    except OSError as error:
        damage.add(f"cannot be read: {error.strerror or error}")


def _grouped(reader: TarReader, groups: Groups) -> Iterator[Leftover]:
    """Fill `groups` with the parts of each key; the members that are no parts."""
    for member in reader.members():
        folders = [part for part in member.name.split("/") if part not in ("", ".")]
        base = folders.pop() if folders else ""
        stem, _, ending = base.rpartition(".") if "." in base else (base, "", "")
        if reason := _reason(member, [*folders, stem], kind := ending.lower()):
            yield Leftover(member.name, reason)
        else:
            part = _Part(kind, member.start, member.size, member.whole)
            groups.setdefault("/".join([*folders, stem]), []).append(part)


def _reason(member: TarMember, names: list[str], kind: str) -> Unused | None:
    """Why a member in the folders `names`, of which the last is its own, is no part of a sample."""
    if reason := _UNUSED.get(member.kind):
        return reason
    if any(name.startswith(".") or name == "__MACOSX" for name in names) or not names[-1]:
        return Unused.HIDDEN
    return None if kind in (*PICTURES, *_TEXTS) else Unused.OTHER_KIND


def _set_apart(groups: Groups, table: TableRecords) -> Iterator[Leftover]:
    """Take further members of webdataset's samples out of `groups`: `000.seg.png`, where there is a sample `000`."""
    for key in list(groups):
        folder, slash, base = key.rpartition("/")
        if "." not in base or folder + slash + base.partition(".")[0] not in groups:
            continue
        kinds = {part.kind for part in groups[key]}
        if kinds.isdisjoint(PICTURES) or (kinds.isdisjoint(_TEXTS) and key not in table and base not in table):
            yield from (Leftover(f"{key}.{part.kind}", Unused.SECOND_MEMBER) for part in groups.pop(key))


def _table_rows(found: Sequence[_Sample], table: TableRecords, damage: Damage) -> dict[str, Record]:
    """The row of the table for each key of one sample: by the whole key, or by its last part if no other ends so."""
    counts = Counter(sample.key for sample in found)
    bases = Counter(key.rpartition("/")[2] for key in counts)
    rows = {}
    for key in counts if table else ():
        base = key.rpartition("/")[2]
        row = table.get(key) or (table.get(base) if bases[base] == 1 else None)
        if row is not None and counts[key] == 1:
            rows[key] = row
    if table and found and not rows:
        damage.add("has a table beside it in which none of its keys is found")
    return rows


def _samples(groups: Groups) -> list[_Sample]:
    """The samples in the order in which each begins.

    Where a key is there twice with the same kinds of members, as when tars are joined, the first ones of each kind
    belong together and so do the second ones. If the kinds do not come out even nobody can tell which belong together.
    """
    found = []
    for key, parts in groups.items():
        kinds: Groups = {}
        for part in parts:
            kinds.setdefault(part.kind, []).append(part)
        even = len({len(each) for each in kinds.values()}) == 1
        for several in zip_longest(*kinds.values()):
            own = tuple(part for part in several if part is not None)
            found.append(_Sample(key, own, None if even else Reason.AMBIGUOUS_KEY))
    return sorted(found, key=lambda sample: min(part.start for part in sample.parts))


def _pictures(sample: _Sample) -> list[_Part]:
    return sorted((part for part in sample.parts if part.kind in PICTURES), key=lambda part: PICTURES.index(part.kind))


def _further(sample: _Sample) -> Iterator[Leftover]:
    """The pictures of a sample besides the one that is taken."""
    return (Leftover(f"{sample.key}.{part.kind}", Unused.SECOND_MEMBER) for part in _pictures(sample)[1:])


def _raw_sample(file: BinaryIO, sample: _Sample, row: Record) -> RawSample:
    pictures = _pictures(sample)
    texts = sorted((part for part in sample.parts if part.kind in _TEXTS), key=lambda part: _TEXTS.index(part.kind))
    members = len(texts) + min(1, len(pictures))
    record = Record(key=clean_caption(sample.key) or "-")
    if fault := sample.fault or _size_fault([*texts, *pictures[:1]]):
        return RawSample(record=record, fault=fault, members=members)
    try:
        for part in texts:
            record = completed(record, _text_record(part.kind, _content(file, part)))
        picture = _content(file, pictures[0]) if pictures else None
    except _ShortError:
        return RawSample(record=record, fault=Reason.CUT_SHORT, members=members)
    except (ValueError, RecursionError):
        return RawSample(record=record, fault=Reason.DAMAGED_METADATA, members=members)
    return RawSample(record=completed(record, row), picture=picture, members=members)


def _size_fault(parts: Sequence[_Part]) -> Reason | None:
    """What is wrong with a sample before anything of it is read."""
    if not all(part.whole for part in parts):
        return Reason.CUT_SHORT
    if any(part.size > LARGEST_TEXT for part in parts if part.kind in _TEXTS):
        return Reason.DAMAGED_METADATA
    return Reason.TOO_LARGE if any(part.size > LARGEST_PICTURE_FILE for part in parts) else None


class _ShortError(Exception):
    """The file has become shorter, or the disk does not give what it holds."""


def _content(file: BinaryIO, part: _Part) -> bytes:
    try:
        file.seek(part.start)
        data = file.read(part.size)
    except OSError as error:
        raise _ShortError from error
    if data is None or len(data) < part.size:
        raise _ShortError
    return data


def _text_record(kind: str, data: bytes) -> Record:
    """What a caption's file or a JSON object says; `ValueError` if it cannot be read."""
    text = decoded_text(data)
    if kind != "json":
        return Record(caption=clean_caption(text))
    columns = json.loads(text)
    if not isinstance(columns, dict):
        raise ValueError("not an object")
    return record_from(columns)
