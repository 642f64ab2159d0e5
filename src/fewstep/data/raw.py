"""Raw samples of a collection: pictures with their metadata, and tar members that belong to no picture."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from fewstep.data.columns import Record
from fewstep.data.filters import Reason

LARGEST_PICTURE_FILE = 1 << 26  # bytes: 64 MiB
LARGEST_TEXT = 1 << 20  # bytes of a caption's file or of a JSON object
NAMED = 8  # faults of one input that its damage names; the others are counted


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One picture of a collection: its metadata, its file, and the fault that reading found, if any.

    `members` counts the members of a tar that it is made of; of a table, the one row.
    """

    record: Record
    picture: bytes | None = None
    fault: Reason | None = None
    members: int = 1


class Unused(StrEnum):
    """Why a member of a tar is part of no picture: a closed list.

    SECOND_MEMBER: a further picture of a sample, `000.png` or `000.seg.png` beside `000.jpg`. SPECIAL: a sparse file,
    a device, a continued volume.
    """

    FOLDER = "folder"
    LINK = "link"
    SPECIAL = "special"
    HIDDEN = "hidden"
    OTHER_KIND = "other_kind"
    SECOND_MEMBER = "second_member"
    DAMAGED_HEADER = "damaged_header"


class Leftover(NamedTuple):
    """A member of a tar that is part of no picture, and why."""

    name: str
    reason: Unused


class DamageError(Exception):
    """Something of an input cannot be read; whatever could be was."""


class Damage:
    """What is wrong with an input: `add` notes a fault in words, `require_none` raises `DamageError` with them."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.count = 0

    def add(self, fault: str) -> None:
        """Note `fault`; of more than 8 the others are only counted."""
        self.count += 1
        if self.count <= NAMED:
            self.faults.append(fault)

    def require_none(self) -> None:
        """Raise `DamageError` if there is a fault."""
        if self.count:
            more = f"; and {self.count - NAMED:,} faults more" if self.count > NAMED else ""
            raise DamageError("; ".join(self.faults) + more)
