"""Files and folders that appear whole or not at all, files that are read without trust, and checksums."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.errors import CheckpointError, InputError, MissingExtraError, NotFiniteError, printable, quoted
from fewstep.memory import is_short_of_memory, shortage

PARTIAL, OLD = ".partial", ".old"
FORSAKEN_SECONDS = 3600.0
"""For how long nothing has touched a partial file of another name before it counts as left behind."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMAINS = re.compile(r"\.(?P<name>.+?)\.(?P<pid>\d+)(\.[0-9a-f]{8})?(?P<kind>\.partial|\.old)")


@contextmanager
def partial_path(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to, renamed to `path` once the block has ended and all is on the disk.

    Whatever goes wrong leaves what was there before. A full disk is an `OSError` that says what to do.
    """
    partial = _aside(path)
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


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to fill, put in its place once the block has ended and all is on the disk.

    A kill at any moment leaves a whole folder under the name, the one before or the new one: both names are exchanged
    at once (Linux). Where the system cannot, there is an instant with neither, which `recover_folder` mends. What dead
    processes left beside it is removed.
    """
    path = Path(os.path.realpath(path))  # a link stays one, and what it leads to is replaced
    recover_folder(path)
    sweep_partials(path.parent, own=path.name)
    partial = _aside(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        for one in (*partial.rglob("*"), partial):
            _sync(one)
        _put_in_place(partial, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange it is the one before


def recover_folder(path: Path) -> None:
    """Bring back the folder that a process moved aside before it was killed, if nothing is at `path`."""
    if os.path.lexists(path):
        return
    for one, name, kind in _remains(path.parent):
        if kind == OLD and name == path.name[:200]:
            one.rename(path)
            return


def sweep_partials(folder: Path, *, own: str | None = None) -> None:
    """Remove from `folder` what this user's processes were writing when they died.

    With `own`, what would have become the entry of that name; of others only what nothing has touched for an hour: it
    may be another machine's, on a disk that both share.
    """
    for one, name, _ in _remains(folder):
        if own in (None, name) or time.time() - one.lstat().st_mtime > FORSAKEN_SECONDS:
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one, ignore_errors=True)
            else:
                one.unlink(missing_ok=True)


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


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")


def _remains(folder: Path) -> list[tuple[Path, str, str]]:
    """What dead processes of this user left in `folder`: path, the name it was for, and ".partial" or ".old"."""
    found = []
    with suppress(OSError, ValueError):  # no such folder, or one that cannot be read
        for one in folder.glob(".*"):
            match = _REMAINS.fullmatch(one.name)
            if match and _is_dead(int(match["pid"])) and one.lstat().st_uid == os.getuid():
                found.append((one, match["name"], match["kind"]))
    return found


def _is_dead(process: int) -> bool:
    if os.name == "nt":  # where signal 0 ends a process
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _put_in_place(partial: Path, path: Path) -> None:
    """Give `partial` the name `path`; what had it goes to `partial`'s, or is removed."""
    if not path.exists():
        partial.rename(path)
    elif not _exchanged(partial, path):
        old = partial.with_suffix(OLD)
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system and the disk can: Linux's renameat2 with RENAME_EXCHANGE."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk; folders where the system can."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        if path.is_dir():
            return
        raise
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(number)
    finally:
        os.close(number)
