"""`fewstep inspect`: what a picture was made with, and what a checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli import checkpoint, comfyui, models
from fewstep.errors import InputError, printable, quoted

LONGEST = 400  # letters of one value, for people
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


def inspect(
    what: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="A picture, a file or folder of weights, a name.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a picture was made with, or what a checkpoint or a model is; loads no weights, fetches nothing."""
    try:
        found = description(what)
        text = json.dumps(found, indent=2) if as_json else table(found)
    except RecursionError as error:
        raise InputError(f"{quoted(what)} holds values in values that are nested too deeply to be shown") from error
    typer.echo(text)


def description(what: str) -> dict[str, Any]:
    """What is known about the picture, the weights or the model called `what`."""
    from fewstep.weights.fetch import cached_folder, is_cached, named

    found = named(what)
    if isinstance(found, Path):
        kind = _picture(found) if _is_picture(found) else {"kind": "checkpoint", **checkpoint.describe(found)}
        return {"file": str(found), **kind}
    if not isinstance(found, str):
        folder = models.folder_of(found) if is_cached(found) else None
        parts = {} if folder is None else {"parts": checkpoint.describe(folder).get("parts", {})}
        return {"kind": "model", **models.details(found), **parts}
    folder = cached_folder(found)
    if folder is None:
        raise InputError(f"{quoted(found)} is no file and no name, and the hub's cache has no model of that id")
    return {"model": found, "kind": "model", "folder": str(folder), **checkpoint.describe(folder)}


def table(found: Mapping[str, Any]) -> str:
    """Two columns: what, and how much; nested entries are indented, and what is not known is left out."""
    rows = list(_rows(found))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:{width}}{text}".rstrip() for label, text in rows)


def _is_picture(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4).startswith(_PICTURES)


def _picture(file: Path) -> dict[str, Any]:
    from fewstep import images

    settings = images.read_metadata(file)
    if settings is not None:
        ours = "fewstep" in settings
        return {"kind": "picture", "made_by": "fewstep" if ours else "another program", "settings": settings}
    graph = comfyui.read_settings(file)
    return {"kind": "picture", "made_by": None if graph is None else "ComfyUI", "settings": graph or {}}


def _rows(found: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        label = f"{indent}{_text(name)[:40].replace('_', ' ')}"
        if isinstance(value, Mapping) and isinstance(value.get("parameters"), int) and "dtypes" in value:
            yield label, f"{value['parameters']:,} parameters, {_text(value['dtypes'])}"
        elif isinstance(value, Mapping) and len(indent) < 4:
            yield label, "" if value else "none"
            yield from _rows(value, indent + "  ")
        elif value is not None:
            yield label, _text(value)


def _text(value: Any) -> str:
    """`value` for people: on one line, cut in the middle when long, and nothing in it that a terminal would act on."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    plain = isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value)
    text = ", ".join(map(str, value)) if plain else str(value)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]} ({len(text):,} letters; --json has them all)"
    return printable(text).replace("\n", "\\n")
