"""Parquet files as rows, a few at a time: what is damaged in them is noted, and the rest read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.data.columns import HASHES, NAMES, Record, completed, record_from
from fewstep.data.filters import Reason
from fewstep.data.raw import LARGEST_PICTURE_FILE, Damage, Found
from fewstep.data.tar_samples import PICTURES
from fewstep.errors import MissingExtraError, printable, quoted

PICTURE_COLUMNS = ("image", "picture", *PICTURES)
ROWS = 256  # read at a time, at most
_AT_ONCE = 1 << 24  # bytes of rows read at a time, if each value were as long as its column in the row group
_LARGEST_COLUMN = 1 << 24  # bytes of a column in a row group that may have been compressed to nearly nothing
_MOST_SHRUNK = 20  # times that larger columns may have been compressed
_MOST_REPEATED = 8  # times that the values of a row group may be used
_MOST_GROUPS = 100_000
_LARGEST_FOOTER = 1 << 24  # bytes

Row = dict[str, Any]


def table_samples(path: Path, damage: Damage) -> Iterator[Found]:
    """The pictures in the rows of a parquet file, by their numbers where it has no keys.

    What cannot be read is added to `damage`. A row that makes no sense is a picture with damaged metadata.
    """
    for number, row in _rows(path, damage, pictures=True):
        if row is None:
            yield Found(record=Record(key=str(number)), fault=Reason.DAMAGED_METADATA)
            continue
        picture = _picture(row)
        large = picture is not None and len(picture) > LARGEST_PICTURE_FILE
        record = completed(record_from(row), Record(key=str(number)))
        yield Found(record=record, picture=picture, fault=Reason.TOO_LARGE if large else None)


def table_records(path: Path, damage: Damage) -> dict[str, Record]:
    """What a table without pictures says, by key. Two rows with one key say nothing, since nobody can tell which."""
    said, twice = dict[str, Record](), set[str]()
    for _, row in _rows(path, damage, pictures=False):
        record = record_from(row or {})
        if record.key is not None and record.key in said and said[record.key] != record:
            twice.add(record.key)
        if record.key is not None:
            said[record.key] = record
    if twice:
        damage.add(f"says different things of {len(twice):,} keys, {quoted(min(twice))} among them; none is used")
    return {key: replace(record, key=None) for key, record in said.items() if key not in twice}


def _picture(row: Row) -> bytes | None:
    """The file in a row, as bytes or as a structure with `bytes` in it; tables of links alone have none."""
    columns = {name.lower(): value for name, value in row.items()}
    values = (columns.get(name) for name in PICTURE_COLUMNS)
    files = (value.get("bytes") if isinstance(value, dict) else value for value in values)
    return next((file for file in files if isinstance(file, bytes)), None)


def _rows(path: Path, damage: Damage, *, pictures: bool) -> Iterator[tuple[int, Row | None]]:
    """The known columns of each row, by its number; None for a row that cannot be read."""
    try:
        with path.open("rb") as source:
            file, groups = _opened(path, source)
            known = {*HASHES, *(name for names in NAMES.values() for name in names)}
            known |= set(PICTURE_COLUMNS) if pictures else set()
            columns = [
                field.name for field in file.schema_arrow if field.name.lower() in known and _is_flat(field.type)
            ]
            first = 0
            for group in range(groups):
                yield from _group_rows(file, group, first, columns, damage)
                first += file.metadata.row_group(group).num_rows
    except _unreadable() as error:
        damage.add(f"is not a readable parquet file: {_first_line(error)}")


def _opened(path: Path, source: Any) -> tuple[Any, int]:
    """The file and its number of row groups; `ValueError` if it claims more than its bytes can hold."""
    from pyarrow import parquet

    size = path.stat().st_size
    source.seek(max(0, size - 8))
    if (footer := int.from_bytes(source.read(4), "little")) > _LARGEST_FOOTER:
        raise ValueError(f"its footer has {footer:,} bytes; over {_LARGEST_FOOTER:,} are not read")
    source.seek(0)
    file = parquet.ParquetFile(
        source,
        buffer_size=1 << 16,
        pre_buffer=False,
        thrift_string_size_limit=_LARGEST_FOOTER,
        thrift_container_size_limit=_MOST_GROUPS,
        page_checksum_verification=True,
    )
    about = file.metadata
    if not 0 <= about.num_rows <= size or about.num_row_groups * about.num_columns > 10 * _MOST_GROUPS:
        raise ValueError(f"it claims {about.num_rows:,} rows in {about.num_row_groups:,} groups, in {size:,} bytes")
    return file, about.num_row_groups


def _is_flat(kind: Any) -> bool:
    """Whether a value is one value, or a structure of such: a list may hold a billion in a few bytes."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(not types.is_nested(kind.field(i).type) for i in range(kind.num_fields))
    return not types.is_nested(kind)


def _group_rows(
    file: Any, group: int, first: int, columns: list[str], damage: Damage
) -> Iterator[tuple[int, Row | None]]:
    number = first
    try:
        bytes_in_all = _group_bytes(file.metadata.row_group(group), columns)
        at_once = max(1, min(ROWS, _AT_ONCE // max(1, bytes_in_all)))
        left = _MOST_REPEATED * bytes_in_all + _AT_ONCE
        for batch in file.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
            for row in _as_rows(batch):
                left -= _weight(row)
                if left < 0:
                    raise ValueError(f"its values repeat over {_MOST_REPEATED} times")
                yield number, row
                number += 1
    except _unreadable() as error:
        rows = f"from row {number:,} on" if number > first else "as a whole"
        damage.add(f"has a row group {group} that is not read {rows}: {_first_line(error)}")


def _group_bytes(group: Any, columns: list[str]) -> int:
    """The bytes of these columns in a row group; `ValueError` for one that was compressed to nearly nothing."""
    total = 0
    for column in map(group.column, range(group.num_columns)):
        size, packed = column.total_uncompressed_size, column.total_compressed_size
        if column.path_in_schema.partition(".")[0] not in columns:
            continue
        if size < 0 or (size > _LARGEST_COLUMN and size > _MOST_SHRUNK * packed):
            raise ValueError(f"its column {quoted(column.path_in_schema)} claims {size:,} bytes in {packed:,}")
        total += size
    return total


def _as_rows(batch: Any) -> Iterator[Row | None]:
    """The rows of a batch; None for one with a text that is no UTF-8, a date that does not exist and the like."""
    for i in range(batch.num_rows):
        try:
            row = batch.slice(i, 1).to_pylist()[0]
        except _unreadable():
            row = None
        yield row


def _weight(row: Row | None) -> int:
    """The bytes and characters in a row."""
    values = [
        part for value in (row or {}).values() for part in (value.values() if isinstance(value, dict) else [value])
    ]
    return sum(len(value) for value in values if isinstance(value, bytes | str))


def _unreadable() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged files."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError('parquet files need pyarrow to be read: pip install "fewstep[train]"') from error
    return (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, IndexError)


def _first_line(error: Exception) -> str:
    return printable(str(error).partition("\n")[0])[:200] or type(error).__name__
