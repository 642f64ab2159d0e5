"""The description of an image, of a file or folder of weights, or of a model by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.errors import InputError, quoted
from fewstep.images import read_metadata
from fewstep.inspect import catalogue, checkpoint, comfyui
from fewstep.weights.fetch import cached_folder, is_cached, named

_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


def describe(what: str) -> dict[str, Any]:
    """All that is known of the image, the weights or the model called `what`.

    Raises InputError for a name that is nothing known, and CheckpointError for a file that is no checkpoint.
    """
    target = named(what)
    if isinstance(target, Path):
        is_image = _is_image(target)
        content = _image(target) if is_image else {"kind": "checkpoint", **checkpoint.describe(target)}
        return {"file": str(target), **content}
    if not isinstance(target, str):
        folder = catalogue.folder_of(target) if is_cached(target) else None
        parts = {} if folder is None else {"parts": checkpoint.describe(folder).get("parts", {})}
        return {"kind": "model", **catalogue.details(target), **parts}
    folder = cached_folder(target)
    if folder is None:
        raise InputError(f"{quoted(target)} is no file and no name, and the hub's cache has no model of that id")
    return {"model": target, "kind": "model", "folder": str(folder), **checkpoint.describe(folder)}


def _is_image(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4).startswith(_IMAGE_STARTS)


def _image(file: Path) -> dict[str, Any]:
    settings = read_metadata(file)
    if settings is not None:
        ours = "fewstep" in settings
        return {"kind": "picture", "made_by": "fewstep" if ours else "another program", "settings": settings}
    graph = comfyui.read_settings(file)
    return {"kind": "picture", "made_by": None if graph is None else "ComfyUI", "settings": graph or {}}
