"""The rows of a parquet file, read in a process of its own and written to a pipe.

A damaged file can end the process that reads it, or make it take memory without end: here that costs the file alone.
The process has a limit of memory, and what it writes is plain data: for each row the length of a JSON object, the
object, and the picture's bytes, whose number it tells.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.data.columns import decoded_text
from fewstep.data.raw import LARGEST_PICTURE_FILE, NAMED
from fewstep.errors import printable, quoted

LENGTH = struct.Struct("<I")
LONGEST_TEXT = 1 << 17  # characters of a value; captions and links are shorter
ROWS = 256  # read at a time, at most
_AT_ONCE = 1 << 22  # bytes of rows read at a time, if each value were as long as its column in the row group
_LARGEST_COLUMN = 1 << 22  # bytes of a column in a row group that may have been compressed to nearly nothing
_MOST_SHRUNK = 20  # times that larger columns may have been compressed
_MOST_REPEATED = 8  # times that the values of a row group may be used
_MOST_GROUPS = 100_000
_LARGEST_FOOTER = 1 << 24  # bytes
_SPARE = 1 << 26  # bytes of memory for any file
_PER_BYTE = 8  # bytes of memory for each byte of the file
_MOST_MEMORY = 1 << 31  # bytes for the largest file

Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row | None]]


def serve(path: str, columns: str, pictures: str) -> None:
    """Write the `columns` (names in lower case, a JSON list) of each row to stdout, and at the end what was damaged.

    `pictures` lists the columns in which pictures are looked for. Run as a process by `tables`.
    """
    out, damage = os.fdopen(os.dup(1), "wb"), list[str]()
    _unreadable()  # imports pyarrow
    _limit_memory(Path(path).stat().st_size)
    wanted = json.loads(pictures)
    for number, row in _rows(Path(path), {*json.loads(columns), *wanted}, damage):
        picture = None if row is None else _picture(row, wanted)
        sent = picture if picture is not None and len(picture) <= LARGEST_PICTURE_FILE else b""
        values = (
            None if row is None else {name: _plain(value) for name, value in row.items() if name.lower() not in wanted}
        )
        length = None if picture is None else len(picture)
        _send(out, {"number": number, "row": values, "picture": length, "sent": len(sent)}, sent)
    _send(out, {"damage": damage})
    out.flush()


def _send(out: BinaryIO, head: Mapping[str, Any], data: bytes = b"") -> None:
    text = json.dumps(head).encode()
    out.write(LENGTH.pack(len(text)) + text)
    out.write(data)


def _plain(value: Any) -> str | float | None:
    """A value that JSON holds; tables without a note of what their bytes are have texts as bytes."""
    if isinstance(value, bytes):
        with suppress(ValueError):
            value = decoded_text(value[:LONGEST_TEXT])
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    return float(value) if isinstance(value, Decimal) else value if isinstance(value, int | float) else None


def _picture(row: Row, wanted: list[str]) -> bytes | None:
    """The file in a row, as bytes or as a structure with `bytes` in it; tables of links alone have none."""
    columns = {name.lower(): value for name, value in row.items()}
    values = (columns.get(name) for name in wanted)
    files = (value.get("bytes") if isinstance(value, dict) else value for value in values)
    return next((file for file in files if isinstance(file, bytes)), None)


def _limit_memory(size: int) -> None:
    """Let this process take no more than a file of `size` bytes may need, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        most = used + min(_SPARE + _PER_BYTE * size, _MOST_MEMORY)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _rows(path: Path, known: set[str], damage: list[str]) -> Rows:
    """The known columns of each row, by its number; None for a row that cannot be read."""
    try:
        with path.open("rb") as source:
            file, groups = _opened(path, source)
            columns = [
                field.name for field in file.schema_arrow if field.name.lower() in known and _is_flat(field.type)
            ]
            first = 0
            for group in range(groups):
                yield from _group_rows(file, group, first, columns, damage)
                first += file.metadata.row_group(group).num_rows
    except _unreadable() as error:
        _note(damage, f"is not a readable parquet file: {_first_line(error)}")


def _note(damage: list[str], fault: str) -> None:
    damage.append(fault if len(damage) < NAMED else "")  # those are only counted


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


def _group_rows(file: Any, group: int, first: int, columns: list[str], damage: list[str]) -> Rows:
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
        if number - first != (claimed := file.metadata.row_group(group).num_rows):
            raise ValueError(f"{claimed:,} were claimed")
    except _unreadable() as error:
        rows = f"from row {number:,} on" if number > first else "as a whole"
        _note(damage, f"has a row group {group} that is not read {rows}: {_first_line(error)}")


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
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, IndexError, MemoryError)


def _first_line(error: Exception) -> str:
    return printable(str(error).partition("\n")[0])[:200] or type(error).__name__
