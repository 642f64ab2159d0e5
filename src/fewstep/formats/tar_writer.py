"""Tar files that are the same byte for byte."""

from __future__ import annotations

import tarfile
from hashlib import sha256
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE


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
