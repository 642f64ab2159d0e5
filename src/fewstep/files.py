"""Files that appear whole or not at all, and checksums."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.errors import CheckpointError

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


def checksum(path: Path) -> str:
    """The SHA-256 of a file in hex digits."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
