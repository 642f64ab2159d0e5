"""What a collection says of a picture, whatever its columns are called."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

LONGEST_CAPTION = 8192  # characters; the longest prompt that fewstep reads

NAMES: dict[str, tuple[str, ...]] = {
    "key": ("key", "__key__", "sample_id"),
    "caption": ("caption", "text", "top_caption"),
    "url": ("url",),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "aesthetic": ("aesthetic_score", "aesthetics_score", "aesthetic", "aesthetics"),
    "watermark": ("pwatermark", "watermark_score", "watermark"),
    "unsafe": ("punsafe", "unsafe"),
    "similarity": ("similarity", "clip_similarity"),
}
"""The fields of a `Record` and the columns that fill them, in lower case; the first with a usable value wins."""

HASHES = ("hash", "md5", "sha256")
"""Columns with a name that a blocklist may call the picture by."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one picture; None where a collection says nothing that can be used.

    `width` and `height` in pixels, upright. `aesthetic` is about 0 to 10; `watermark` and `unsafe` are
    probabilities. `hashes`: every name, in lower case, that a blocklist may call the picture by.
    """

    key: str | None = None
    caption: str | None = None
    url: str | None = None
    width: int | None = None
    height: int | None = None
    aesthetic: float | None = None
    watermark: float | None = None
    unsafe: float | None = None
    similarity: float | None = None
    hashes: tuple[str, ...] = ()


def record_from(columns: Mapping[str, Any]) -> Record:
    """The record that a row of a table or a JSON object stands for.

    Upper and lower case do not count, except where both spellings are there: then the lower one is read. NaN,
    empty texts and what is not of its kind are nothing; 0 is a value. Captions lose line breaks and all after
    8192 characters.
    """
    lowered = {name.lower(): value for name, value in sorted(columns.items(), key=lambda item: item[0])}
    found = {field: _first(field, lowered) for field in NAMES}
    hashes = [text for name in HASHES if (text := _text(lowered.get(name)))]
    return Record(**found, hashes=tuple(text.lower() for text in hashes))


def completed(record: Record, other: Record) -> Record:
    """`record`, with what it does not say taken from `other`, and the hashes of both."""
    gaps = {f.name: getattr(other, f.name) for f in fields(record) if getattr(record, f.name) is None}
    return replace(record, **gaps, hashes=tuple(dict.fromkeys((*record.hashes, *other.hashes))))


def decoded_text(data: bytes) -> str:
    """The text in `data`: UTF-8, UTF-16 with a byte order mark, or Windows' Latin letters where it is no UTF-8.

    Raises `ValueError` for what is none of them: UTF-8 with a flipped bit, other code pages, binary data.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if b"\0" in data:
        raise ValueError("not a text: it holds zero bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if not data.decode("utf-8", "ignore").isascii():
            raise  # most of it is UTF-8
        return data.decode("cp1252")


def clean_caption(text: str) -> str | None:
    """`text` in one line of at most 8192 characters, without half letters; None if nothing is left."""
    whole = text.encode("utf-8", "ignore").decode("utf-8").replace("\0", " ")
    return " ".join(whole.split())[:LONGEST_CAPTION] or None


def _first(field: str, columns: Mapping[str, Any]) -> Any:
    values = (_KINDS.get(field, _number)(columns.get(name)) for name in NAMES[field])
    return next((value for value in values if value is not None), None)


def _text(value: Any) -> str | None:
    return clean_caption(value if isinstance(value, str) else str(value)) if isinstance(value, str | int) else None


def _caption(value: Any) -> str | None:
    return clean_caption(value) if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _pixels(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 1 else None


_KINDS = {"key": _text, "caption": _caption, "url": _text, "width": _pixels, "height": _pixels}
