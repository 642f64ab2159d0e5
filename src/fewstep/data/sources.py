"""Collections as they come: tar files in the webdataset manner, and parquet tables. Damage is told, not raised."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.data.columns import Record, clean_caption, completed, record_from
from fewstep.data.filters import Reason
from fewstep.errors import InputError, MissingExtraError

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "caption")
KINDS = ("tar", "parquet")
PICTURE_COLUMNS = ("image", "picture", *PICTURES)
LARGEST_MEMBER = 1 << 28  # bytes
ROWS = 64  # of a table, read at a time


@dataclass(frozen=True, kw_only=True)
class Found:
    """One picture of a collection: what is said of it, its file, and what is wrong with it already."""

    record: Record
    picture: bytes | None = None
    fault: Reason | None = None


class DamageError(Exception):
    """The rest of an input cannot be read; all before it was."""


def input_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The tar and parquet files meant by `inputs`, files or folders, in the order in which they are read.

    Folders are searched through and sorted by name. The table beside a tar file of the same name says more of its
    pictures, and is no input of its own. Raises `InputError` where there is nothing to read.
    """
    files = [file for given in inputs for file in _listed(Path(given))]
    tars = {file.with_suffix("") for file in files if file.suffix == ".tar"}
    chosen = [file for file in files if file.suffix == ".tar" or file.with_suffix("") not in tars]
    if not chosen:
        raise InputError("no inputs were given; name a folder of tar or parquet files")
    if twice := [file for file, count in Counter(chosen).items() if count > 1]:
        raise InputError(f"{twice[0]} is given twice; name every input once")
    return chosen


def samples(path: Path) -> Iterator[Found]:
    """The pictures of one tar or parquet file in their order.

    Raises `DamageError` where a file ends too early or makes no sense, `InputError` if it is gone.
    """
    if not path.is_file():
        raise InputError(f"the input {path} is gone; put it back and give the same command again")
    yield from _table(path) if path.suffix == ".parquet" else _tar(path)


def _listed(given: Path) -> list[Path]:
    if given.is_dir():
        files = sorted(path for path in given.rglob("*") if path.suffix[1:] in KINDS and path.is_file())
        if not files:
            raise InputError(f"the folder {given} holds no .tar and no .parquet file")
        return files
    if not given.is_file():
        raise InputError(f"there is no file or folder {str(given)!r} to read")
    if given.suffix[1:] not in KINDS:
        raise InputError(f"{given} is neither a .tar nor a .parquet file")
    return [given]


def _tar(path: Path) -> Iterator[Found]:
    table, damage = path.with_suffix(".parquet"), None
    try:
        said = _sidecar(table)
    except DamageError as error:
        said, damage = {}, error
    for key, members in _groups(path):
        found = _found(key, members)
        yield replace(found, record=completed(found.record, said.get(key.rpartition("/")[2], Record())))
    if damage:
        raise DamageError(f"its table {table.name} {damage}")


def _groups(path: Path) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Members that follow each other with one name up to its first dot; a member's data are None if cut off."""
    key, group = "", dict[str, bytes | None]()
    try:
        for name, data in _members(path):
            folder, slash, base = name.rpartition("/")
            stem, _, kind = base.partition(".")
            if group and folder + slash + stem != key:
                yield key, group
                group = {}
            if kind.lower() in (*PICTURES, *CAPTIONS, "json"):
                key = folder + slash + stem
                group[kind.lower()] = data
    except DamageError:
        if group:
            yield key, group
        raise
    if group:
        yield key, group


def _members(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of the files in a tar; the last content is None if the tar ends within it."""
    try:
        with tarfile.open(path, "r:") as tar:
            while member := _next(tar):
                if member.isreg() and not member.issparse():
                    data = _content(tar, member)
                    yield member.name, data
                    if data is None:
                        raise DamageError(f"ends within {member.name!r}")
            _check_end(path, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DamageError(f"is not a tar file: {error}") from error


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.TarError as error:
        raise DamageError(f"cannot be read after byte {tar.offset}: {error}") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = tar.extractfile(member)
    if file is None or member.size > LARGEST_MEMBER:
        return b""  # no picture is that large
    try:
        return file.read()
    except tarfile.ReadError:
        return None


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a header of garbage for the end; a real end is an empty block or the file's own."""
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise DamageError(f"has no readable header at byte {end}")


def _found(key: str, members: Mapping[str, bytes | None]) -> Found:
    record = Record(key=key)
    if None in members.values():
        return Found(record=record, fault=Reason.CUT_SHORT)
    for kind in CAPTIONS:
        if text := members.get(kind):
            record = completed(record, Record(caption=clean_caption(text.decode("utf-8", "replace"))))
    try:
        record = completed(record, _parsed(members.get("json")))
    except (ValueError, RecursionError):
        return Found(record=record, fault=Reason.DAMAGED_METADATA)
    return Found(record=record, picture=next((members[kind] for kind in PICTURES if kind in members), None))


def _parsed(text: bytes | None) -> Record:
    if text is None:
        return Record()
    columns = json.loads(text)
    if not isinstance(columns, dict):
        raise ValueError("not an object")
    return record_from(columns)


def _sidecar(path: Path) -> dict[str, Record]:
    """The records of the table beside a tar file, by key; none where there is no table."""
    if not path.is_file():
        return {}
    records = (record_from(row) for row in _rows(path, pictures=False))
    return {record.key: record for record in records if record.key}


def _table(path: Path) -> Iterator[Found]:
    for number, row in enumerate(_rows(path, pictures=True)):
        record = completed(record_from(row), Record(key=str(number)))
        yield Found(record=record, picture=_picture(row))


def _picture(row: Mapping[str, Any]) -> bytes | None:
    """The file in a row, as bytes or as a structure with `bytes` in it; tables of links alone have none."""
    values = (row.get(name) for name in PICTURE_COLUMNS)
    files = (value.get("bytes") if isinstance(value, dict) else value for value in values)
    return next((file for file in files if isinstance(file, bytes)), None)


def _rows(path: Path, *, pictures: bool) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(f'{path} needs pyarrow to be read: pip install "fewstep[train]"') from error
    try:
        file = parquet.ParquetFile(path)
        names: Sequence[str] = file.schema_arrow.names
        columns = [name for name in names if pictures or name.lower() not in PICTURE_COLUMNS]
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DamageError(f"is not a readable parquet file: {error}") from error
