"""The folder of what engines find out about this machine: nobody else can write to it."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """The folder, made where it is not there; None where that cannot be, or where another user could write to it.

    It is `fewstep` in XDG_CACHE_HOME, or in `~/.cache` where that names no absolute path.
    """
    folder = _named()
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
        if _is_link_of_others(folder):
            raise OSError("it is a link that another user has made")
        folder = folder.resolve(strict=True)
        if not folder.is_dir():
            raise OSError("it is no folder")
        for each in (folder, *folder.parents):
            if not _is_safe(each.lstat(), above=each is not folder):
                raise OSError(f"other users can write to {each}")
    except (OSError, ValueError, RuntimeError) as error:  # of no access, null bytes, links in a circle
        _log.debug("%s is not used: %s", folder, error)
        return None
    return folder


def is_own(status: os.stat_result) -> bool:
    """Whether this user owns it, and nobody else can write to it."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not _is_open(status))


def _named() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "fewstep"
    try:
        return Path.home() / ".cache" / "fewstep"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "fewstep-cache"


def _is_link_of_others(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISLNK(status.st_mode) and hasattr(os, "geteuid") and status.st_uid != os.geteuid()


def _is_safe(status: os.stat_result, *, above: bool) -> bool:
    """Whether nobody else can put another folder in this one's place; `above`: or in the place of one inside it."""
    if not above or not hasattr(os, "geteuid"):
        return is_own(status)
    return status.st_uid in (0, os.geteuid()) and (not _is_open(status) or bool(status.st_mode & stat.S_ISVTX))


def _is_open(status: os.stat_result) -> bool:
    """Whether others can write to it: all, or a group that is not the owner's alone, which has the owner's number."""
    alone = status.st_gid == status.st_uid != 0
    return bool(status.st_mode & (0o002 if alone else 0o022))
