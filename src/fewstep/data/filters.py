"""Which pictures are trained on, and the one reason why another is not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from fewstep.data.columns import Record
from fewstep.errors import InputError, unknown

Missing = Literal["reject", "keep"]
POLICIES: tuple[Missing, ...] = ("reject", "keep")


class Reason(StrEnum):
    """Why a picture is left out: a closed list, in the order of the checks. Of several reasons the first is told.

    TOO_SMALL is checked twice: on the metadata, then on the decoded picture.
    """

    AMBIGUOUS_KEY = "ambiguous_key"
    CUT_SHORT = "cut_short"
    DAMAGED_METADATA = "damaged_metadata"
    NO_CAPTION = "no_caption"
    BLOCKED = "blocked"
    TOO_SMALL = "too_small"
    MISSING_AESTHETIC = "missing_aesthetic"
    LOW_AESTHETIC = "low_aesthetic"
    MISSING_WATERMARK = "missing_watermark"
    WATERMARK = "watermark"
    MISSING_UNSAFE = "missing_unsafe"
    UNSAFE = "unsafe"
    NO_PICTURE = "no_picture"
    NOT_A_PICTURE = "not_a_picture"
    TOO_LARGE = "too_large"
    DAMAGED_PICTURE = "damaged_picture"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"


@dataclass(frozen=True, kw_only=True)
class Filter:
    """The rule of Stable Diffusion v1-2 and later; a limit of None is not looked at.

    Kept are pictures with a caption whose smaller side has at least `min_size` pixels, whose aesthetic score is
    over `min_aesthetic`, whose probabilities of a watermark and of unsafe contents are under `max_watermark` and
    `max_unsafe`, and that no hash in `blocked` names. `missing` says what becomes of a picture without a score
    that is asked for, or without a caption. A size that is not told is not missing: the picture itself has one.
    """

    min_size: int | None = 512
    min_aesthetic: float | None = 5.0
    max_watermark: float | None = 0.5
    max_unsafe: float | None = 0.5
    blocked: frozenset[str] = frozenset()
    missing: Missing = "reject"

    def __post_init__(self) -> None:
        if self.missing not in POLICIES:
            raise InputError(unknown("policy for missing values", self.missing, POLICIES))
        limits = {name: getattr(self, name) for name in ("min_aesthetic", "max_watermark", "max_unsafe")}
        if wrong := [name for name, value in limits.items() if value is not None and not isfinite(value)]:
            raise InputError(f"{wrong[0]} is {limits[wrong[0]]}; it is a number, or None for no limit")
        if self.min_size is not None and self.min_size < 1:
            raise InputError(f"min_size is {self.min_size}; it is a number of pixels, 1 or more, or None")

    def rejection(self, record: Record) -> Reason | None:
        """Why the picture of `record` is left out, or None if it is kept."""
        if record.caption is None and self.missing == "reject":
            return Reason.NO_CAPTION
        if not self.blocked.isdisjoint(record.hashes):
            return Reason.BLOCKED
        sides = [side for side in (record.width, record.height) if side is not None]
        if self.min_size is not None and min(sides, default=self.min_size) < self.min_size:
            return Reason.TOO_SMALL
        return self._score_rejection(record)

    def settings(self) -> dict[str, Any]:
        """The rule as JSON values; the blocklist as its length and its checksum."""
        listed = sha256("\n".join(sorted(self.blocked)).encode()).hexdigest()
        return vars(self) | {"blocked": {"hashes": len(self.blocked), "sha256": listed}}

    def _score_rejection(self, record: Record) -> Reason | None:
        rules = (
            (record.aesthetic, self.min_aesthetic, Reason.MISSING_AESTHETIC, Reason.LOW_AESTHETIC),
            (record.watermark, self.max_watermark, Reason.MISSING_WATERMARK, Reason.WATERMARK),
            (record.unsafe, self.max_unsafe, Reason.MISSING_UNSAFE, Reason.UNSAFE),
        )
        for value, limit, missing, beyond in rules:
            if limit is None or (value is None and self.missing == "keep"):
                continue
            if value is None:
                return missing
            if value <= limit if beyond is Reason.LOW_AESTHETIC else value >= limit:
                return beyond
        return None


def read_blocklist(path: str | Path) -> frozenset[str]:
    """The hashes in a text file, one a line: MD5 or SHA-256 of the picture's file, or the collection's own.

    Empty lines and what follows a `#` do not count. Raises `InputError` for a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the blocklist {path} cannot be read: {error}") from error
    entries = (line.partition("#")[0].strip().lower() for line in lines)
    return frozenset(entry for entry in entries if entry)
