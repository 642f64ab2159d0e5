"""Files that appear whole or not at all, tar files that are the same byte for byte, and checksums."""

from __future__ import annotations

import errno
import json
import os
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.errors import CheckpointError

BLOCK = tarfile.BLOCKSIZE
PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` once the block has ended and all is on the disk.

    Whatever goes wrong leaves what was there before. A full disk is an `OSError` that says what to do.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all; equal values give equal bytes."""
    with whole_file(path) as file:
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


class TarWriter:
    """Writes a tar file in which nothing but names and contents tells one from another; counts and sums up.

    `size` is the bytes written so far, `digest` their running SHA-256.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the place in the file where its data begin."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        start = self.size
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return start

    def end(self) -> None:
        """Write the two empty blocks that a tar file ends with."""
        self._write(bytes(2 * BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
