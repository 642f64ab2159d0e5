"""Prompts from text files, and captions of held-out block scenes."""

from __future__ import annotations

import codecs
from pathlib import Path

from fewstep.errors import InputError, quoted
from fewstep.files import file_size


def read_lines(path: Path) -> list[str]:
    """All lines of a text file without the spaces around them; UTF-8, or UTF-16 with a byte order mark.

    Raises InputError for a file that cannot be read or decoded.
    """
    try:
        file_size(path)
        content = path.read_bytes()
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{quoted(path)} cannot be read as text: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{quoted(path)} cannot be read as text in UTF-8: {error.reason}; save it as that") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # as editors count them
    return [line.strip() for line in lines]


def numbered_prompts(path: Path) -> list[tuple[int, str]]:
    """The prompts of a file with their line numbers from 1; empty lines and those that begin with # are none.

    Raises InputError for a file without a prompt.
    """
    prompts = [(number, line) for number, line in enumerate(read_lines(path), start=1) if line and line[0] != "#"]
    if not prompts:
        raise InputError(f"{quoted(path)} holds no prompt; write one a line")
    return prompts


def read_prompts(path: Path, count: int) -> list[str]:
    """The first `count` lines of a file that are not empty, or as many as there are, with single spaces between words.

    Raises InputError for none.
    """
    prompts = [" ".join(line.split()) for line in read_lines(path) if line][:count]
    if not prompts:
        raise InputError(f"{quoted(path)} holds no prompt; write one a line")
    return prompts


def held_out_prompts(count: int, seed: int) -> list[str]:
    """At most `count` distinct captions of block scenes from the held-out split, which no model was trained on."""
    from fewstep.blockworld import captions, scenes

    sampled = scenes(4 * count, seed=seed, split="heldout")
    return list(dict.fromkeys(captions(sampled, seed=seed, style="canonical")))[:count]
