"""`fewstep inspect`: what a picture was made with, and what a checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli import checkpoint
from fewstep.errors import InputError

_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


def inspect(
    file: Annotated[Path, typer.Argument(help="A picture, a file of weights, or a diffusers folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a picture was made with, or what a checkpoint is; loads no weights."""
    found = {"file": str(file), **_description(file)}
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)


def _description(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise InputError(f"there is no file or folder {str(file)!r}")
    return _picture(file) if _is_picture(file) else {"kind": "checkpoint", **checkpoint.describe(file)}


def _is_picture(file: Path) -> bool:
    if file.is_dir():
        return False
    with file.open("rb") as stream:
        return stream.read(4).startswith(_PICTURES)


def _picture(file: Path) -> dict[str, Any]:
    from fewstep import images

    settings = images.read_metadata(file)
    if settings is None:
        return {"kind": "picture", "made_by": None, "settings": {}}
    ours = "fewstep" in settings
    return {"kind": "picture", "made_by": "fewstep" if ours else "another program", "settings": settings}


def _print(found: Mapping[str, Any]) -> None:
    """Two columns: what, and how much; nested entries are indented, and what is not known is left out."""
    rows = list(_rows(found))
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        typer.echo(f"{label:{width}}{text}".rstrip())


def _rows(found: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, Mapping) and "parameters" in value:
            yield label, f"{value['parameters']:,} parameters, {_text(value['dtypes'])}"
        elif isinstance(value, Mapping):
            yield label, "" if value else "none"
            yield from _rows(value, indent + "  ")
        elif value is not None:
            yield label, _text(value)


def _text(value: Any) -> str:
    """`value` for people, without what a hostile file could tell a terminal to do."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
