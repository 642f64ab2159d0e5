"""The members of a tar file, whatever is in it: where each lies, in one pass over the headers.

Reads the ustar, pax and GNU formats (POSIX.1-2001, and tar's "Basic Tar Format"). Unlike `tarfile` it goes on after a
header that makes no sense, never recurses, and takes a time that grows with the number of headers alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from enum import Enum, auto
from typing import BinaryIO, NamedTuple

from fewstep.data.raw import Damage
from fewstep.errors import quoted

BLOCK = 512
LONGEST_NAME = 4096  # bytes
LARGEST_EXTENSION = 1 << 20  # bytes of a pax header; those of macOS hold icons
MOST_RECORDS = 100  # of a pax header; tar writes ten or so
MOST_MEMBERS = 1_000_000
LARGEST_GAP = 1 << 27  # bytes of one file that are searched for the next header, all gaps together
_PIECE = 1 << 20  # of a gap, read at a time
_MAGIC, _MAGIC_AT = b"ustar", 257
_DIGITS = 8  # of the length of a pax record
_HIGH_BYTES = bytes(range(128, 256))


class Kind(Enum):
    """What a member is; DAMAGED where its extended header cannot be read, so that its name and size are in doubt."""

    FILE = auto()
    FOLDER = auto()
    LINK = auto()
    SPECIAL = auto()
    DAMAGED = auto()


class TarMember(NamedTuple):
    r"""A member: its name with `/` between folders, where its `size` bytes start, and whether the file holds them all.

    Bytes of a name that are not UTF-8 stand in it as `\xff`.
    """

    name: str
    kind: Kind
    start: int
    size: int
    whole: bool


class _Header(NamedTuple):
    name: bytes
    type: bytes
    size: int


class _Extension(NamedTuple):
    """What extended headers say of the next member."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False
    damaged: bool = False


_TYPES = {b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"5": Kind.FOLDER, b"1": Kind.LINK, b"2": Kind.LINK}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")


class TarReader:
    """The members of the tar in `file`, from its start to its end.

    What is met that is no member is added to `damage`. Members behind an end mark
    (tars written one after another) are read as well. Of `file` only headers are read.
    """

    def __init__(self, file: BinaryIO, damage: Damage) -> None:
        self.file, self.length = file, file.seek(0, io.SEEK_END)
        self.damage = damage
        self._searched, self._filled = 0, False  # bytes of gaps, and whether the last one holds any but zeros

    def members(self) -> Iterator[TarMember]:
        """Every member in order, 1,000,000 at most. Raises `OSError` where the disk fails."""
        at, count, extension = 0, 0, _Extension()
        if not self.length:
            self.damage.add("is not a tar file: it is empty")
        while at < self.length:
            header = _header(block := self._read(at, BLOCK))
            if header is None:
                at, extension = self._gap(at, block, extension), _Extension()
            elif header.type in _EXTENSIONS:
                extension = self._extended(header, at, extension)
                at = self._after(at, header.size)
            elif count == MOST_MEMBERS:
                self.damage.add(f"has over {MOST_MEMBERS:,} members, and those from byte {at:,} on are not read")
                return
            else:
                member, extension, count = self._member(header, at, extension), _Extension(), count + 1
                yield member
                at = self._after(member.start - BLOCK, member.size)

    def _read(self, start: int, length: int) -> bytes:
        self.file.seek(start)
        return self.file.read(length)

    def _after(self, at: int, size: int) -> int:
        """Where the header after the data of the one at `at` is; if that is out of the file, the next one in it."""
        end = at + BLOCK + size + -size % BLOCK
        return end if at + BLOCK + size <= self.length else self._next_header(at + BLOCK)

    def _member(self, header: _Header, at: int, extension: _Extension) -> TarMember:
        start = at + BLOCK
        if header.type == b"S":
            start = self._after_sparse_map(at)
        size = header.size if extension.size is None else extension.size
        size = 0 if header.type in _WITHOUT_DATA else size
        raw = header.name if extension.name is None else extension.name
        kind = _TYPES.get(header.type, Kind.SPECIAL)
        if kind is Kind.FILE and raw.endswith(b"/"):
            kind = Kind.FOLDER
        if extension.sparse and kind is Kind.FILE:
            kind = Kind.SPECIAL
        name = raw.replace(b"\\", b"/").decode("utf-8", "backslashreplace")
        if whole := start + size <= self.length:
            return TarMember(name, Kind.DAMAGED if extension.damaged else kind, start, size, whole)
        self.damage.add(f"ends within {quoted(name)}, which claims {size:,} bytes from byte {start:,} on")
        return TarMember(name, Kind.DAMAGED if extension.damaged else kind, start, size, whole)

    def _extended(self, header: _Header, at: int, extension: _Extension) -> _Extension:
        """`extension`, and what the extended header at `at` adds to it."""
        if header.type in (b"g", b"K"):
            return extension
        longest = LONGEST_NAME + 1 if header.type == b"L" else LARGEST_EXTENSION
        data = self._read(at + BLOCK, header.size) if header.size <= longest else b""
        if header.type == b"L" and data:
            return extension._replace(name=data.split(b"\0")[0])
        pax = _pax(data) if len(data) == header.size else None
        if pax is None or len(pax.name or b"") > LONGEST_NAME:
            self.damage.add(f"has an extended header of {header.size:,} bytes at byte {at:,} that cannot be read")
            return extension._replace(damaged=True)
        name, size = extension.name if pax.name is None else pax.name, pax.size
        return _Extension(name, extension.size if size is None else size, extension.sparse or pax.sparse)

    def _after_sparse_map(self, at: int) -> int:
        """Where the data of an old GNU sparse file start: its map may go on in blocks of its own."""
        block, more = self._read(at, BLOCK), 482
        while len(block) == BLOCK and block[more]:
            at, more = at + BLOCK, 504
            block = self._read(at, BLOCK)
        return at + BLOCK

    def _gap(self, at: int, block: bytes, extension: _Extension) -> int:
        """Where the next header is after `block`, which is none; the damage is noted, unless it is an end mark."""
        if extension != _Extension():
            self.damage.add(f"has an extended header before byte {at:,} that belongs to no member")
        self._filled = False
        found = self._next_header(at)
        if block.strip(b"\0") or (self._filled and found >= self.length):
            self._note_gap(at, block, found)
        return found

    def _note_gap(self, at: int, block: bytes, found: int) -> None:
        if at == 0 and found >= self.length:
            packed = block[:2] == b"\x1f\x8b" or block[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX") or block[:3] == b"BZh"
            hint = "it is compressed; unpack it first" if packed else f"it begins with {quoted(block[:16])}"
            self.damage.add(f"is not a tar file: {hint}")
        else:
            upto = f"goes on at byte {found:,}" if found < self.length else "nothing after it is read"
            self.damage.add(f"has no readable header at byte {at:,}, and {upto}")

    def _next_header(self, at: int) -> int:
        """Where the first header from byte `at` on is, a multiple of 512 bytes away; the file's length if none is."""
        start = at
        while start < self.length and self._searched < LARGEST_GAP:
            piece = self._read(start, _PIECE)
            self._searched += len(piece)
            self._filled = self._filled or piece.count(0) < len(piece)
            if not piece:
                break
            place = piece.find(_MAGIC)
            while place >= 0:
                block = place - _MAGIC_AT
                if block >= 0 and block % BLOCK == 0 and _header(piece[block : block + BLOCK]) is not None:
                    return start + block
                place = piece.find(_MAGIC, place + 1)
            start += len(piece)
        if start < self.length:
            self.damage.add(f"has {self.length - start:,} bytes from byte {start:,} on that were not searched")
        return self.length


def _header(block: bytes) -> _Header | None:
    """What a block says, if it is a header: 512 bytes with the right checksum and a size."""
    if len(block) < BLOCK:
        return None
    claimed, size = _number(block[148:156]), _number(block[124:136])
    if claimed is None or size is None or claimed not in _checksums(block):
        return None
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if prefix and block[_MAGIC_AT : _MAGIC_AT + 6] == _MAGIC + b"\0":
        name = prefix + b"/" + name
    return _Header(name, block[156:157], size)


def _checksums(block: bytes) -> Iterator[int]:
    """What programs write as the checksum of a header: the sum of its bytes, or that of its bytes as signed ones."""
    rest = block[:148] + b" " * 8 + block[156:]
    yield (total := sum(rest))
    yield total - 256 * (len(rest) - len(rest.translate(None, _HIGH_BYTES)))


def _number(field: bytes) -> int | None:
    """A number in octal digits, or in base 256 as GNU writes large ones; None for a negative one and for no number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _pax(data: bytes) -> _Extension | None:
    """What the records `LENGTH NAME=VALUE` of a pax header say; None if they are damaged."""
    found, at = _Extension(), 0
    for _ in range(MOST_RECORDS):
        if at == len(data):
            return found
        space = data.find(b" ", at, at + _DIGITS)
        end = at + int(data[at:space]) if space > 0 and data[at:space].isdigit() else 0
        if not space < end <= len(data) or data[end - 1] != ord("\n"):
            return None
        name, _, value = data[space + 1 : end - 1].partition(b"=")
        if name == b"path":
            found = found._replace(name=value.split(b"\0")[0])
        elif name == b"size":
            if not value.isdigit() or len(value) > 19:
                return None
            found = found._replace(size=int(value))
        elif name.startswith(b"GNU.sparse."):
            found = found._replace(sparse=True)
        at = end
    return None
