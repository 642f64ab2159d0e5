"""Files that appear whole or not at all, files that are read without trust, and checksums."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.errors import CheckpointError, InputError, MissingExtraError, NotFiniteError, printable, quoted
from fewstep.memory import is_short_of_memory, shortage

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def partial_path(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to, renamed to `path` once the block has ended and all is on the disk.

    Whatever goes wrong leaves what was there before. A full disk is an `OSError` that says what to do.
    """
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(
                error.errno,
                f"the disk is full while {path} is written; nothing of it is left there. "
                "Make room and give the same command again: it goes on where it was",
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` once the block has ended; see `partial_path`."""
    with partial_path(path) as partial, partial.open("wb") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all; equal values give equal bytes."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file that fewstep wrote; `CheckpointError` if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; prepare its folder again") from error


def file_size(path: Path) -> int:
    """Bytes of the file at `path`; OSError for what is none: a folder, a named pipe, a device, no name at all."""
    try:
        status = path.stat()
    except ValueError as error:
        raise OSError(errno.EINVAL, "a name cannot hold a null byte") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")
    return status.st_size


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """The door of a parser: whatever goes wrong inside becomes a CheckpointError that names the file and the reason."""
    try:
        yield
    except (CheckpointError, InputError, NotFiniteError, MissingExtraError):
        raise
    except Exception as error:  # parsers raise dozens of kinds
        path = printable(str(path))
        if is_short_of_memory(error):
            raise CheckpointError(f"{path} cannot be read: {shortage(error)}") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {quoted(reason, 200)[1:-1]}") from error


def checksum(path: Path) -> str:
    """The SHA-256 of a file in hex digits."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
