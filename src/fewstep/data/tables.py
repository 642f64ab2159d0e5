"""Parquet files as pictures or as metadata of pictures; damaged rows are noted, the others read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from fewstep.data.columns import HASHES, NAMES, Record, completed, record_from
from fewstep.data.filters import Reason
from fewstep.data.raw import LARGEST_PICTURE_FILE, Damage, RawSample
from fewstep.data.table_rows import LENGTH
from fewstep.data.tar_samples import PICTURES
from fewstep.errors import MissingExtraError, quoted

PICTURE_COLUMNS = ("image", "picture", *PICTURES)
_COLUMNS = (*HASHES, *(name for names in NAMES.values() for name in names))
_READ = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from fewstep.data.table_rows import serve
serve(*sys.argv[2:])
"""
SETTINGS = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
"""Of the process: no memory taken ahead, and few threads, since their stacks count towards its limit."""
_LONGEST_HEAD = 1 << 24  # bytes


class _Row(NamedTuple):
    """A row by its number: its columns, None if they cannot be read; its picture, and how long that is."""

    number: int
    columns: dict[str, Any] | None
    picture: bytes | None
    length: int


def table_samples(path: Path, damage: Damage) -> Iterator[RawSample]:
    """The pictures in the rows of a parquet file, by their numbers where it has no keys.

    What cannot be read is added to `damage`. A row that makes no sense is a picture with damaged metadata.
    """
    for row in _rows(path, PICTURE_COLUMNS, damage):
        key = Record(key=str(row.number))
        if row.columns is None:
            yield RawSample(record=key, fault=Reason.DAMAGED_METADATA)
        else:
            fault = Reason.TOO_LARGE if row.length > LARGEST_PICTURE_FILE else None
            yield RawSample(record=completed(record_from(row.columns), key), picture=row.picture, fault=fault)


def table_records(path: Path, damage: Damage) -> dict[str, Record]:
    """What a table without pictures says, by key. Two rows with one key say nothing, since nobody can tell which."""
    records, twice = dict[str, Record](), set[str]()
    for row in _rows(path, (), damage):
        record = record_from(row.columns or {})
        if record.key is not None and record.key in records and records[record.key] != record:
            twice.add(record.key)
        if record.key is not None:
            records[record.key] = record
    if twice:
        damage.add(f"says different things of {len(twice):,} keys, {quoted(min(twice))} among them; none is used")
    return {key: replace(record, key=None) for key, record in records.items() if key not in twice}


def _rows(path: Path, pictures: tuple[str, ...], damage: Damage) -> Iterator[_Row]:
    """The rows of a table, read by a process of its own (see `table_rows`), which ends with this iterator."""
    if find_spec("pyarrow") is None:
        raise MissingExtraError(f'{path} needs pyarrow to be read: pip install "fewstep[train]"')
    words = [json.dumps(sys.path), os.fspath(path), json.dumps(_COLUMNS), json.dumps(pictures)]
    settings = os.environ | SETTINGS
    command = [sys.executable, "-c", _READ, *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=settings
    ) as reader:
        try:
            yield from _received(reader, damage)
        finally:
            reader.kill()


def _received(reader: subprocess.Popen[bytes], damage: Damage) -> Iterator[_Row]:
    pipe, number = reader.stdout, -1
    assert pipe is not None
    with suppress(EOFError):
        while "damage" not in (head := json.loads(_exactly(pipe, LENGTH.unpack(_exactly(pipe, LENGTH.size))[0]))):
            number = head["number"]
            picture = _exactly(pipe, head["sent"])
            yield _Row(number, head["row"], None if head["picture"] is None else picture, head["picture"] or 0)
        for fault in head["damage"]:
            damage.add(fault)
        return
    damage.add(f"ended the process that read it (code {reader.wait()}) after row {number:,}; the rest is not read")


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    data = pipe.read(length) if length <= max(_LONGEST_HEAD, LARGEST_PICTURE_FILE) else b""
    if len(data) < length:
        raise EOFError
    return data
