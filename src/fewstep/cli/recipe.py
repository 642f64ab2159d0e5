"""What makes a picture, as a dict of settings: from the command's options, from a PNG, and into one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import InputError

if TYPE_CHECKING:
    from fewstep import Result

Recipe = dict[str, Any]

MODELS = ("model", "refiner")
PICTURES = ("init", "mask")  # that a recipe reads
_NOT_SHARED = ("prompt", "task", "device", "dtype", "handoff", "strength", *MODELS, *PICTURES)


def complete(asked: Mapping[str, Any]) -> Recipe:
    """The recipe that the options `asked` describe, over that of the PNG `like` if there is one.

    Raises InputError for options that do not go together and files that are not there.
    """
    recipe = {name: value for name, value in asked.items() if name not in ("like", "size", "images")}
    recipe |= _sides(asked)
    if "images" in asked:
        recipe["images_per_prompt"] = asked["images"]
    if "like" in asked:
        recipe = from_png(asked["like"]) | recipe
    _check(recipe)
    return recipe


def keywords(recipe: Recipe) -> Recipe:
    """The keywords that every task takes."""
    return {name: value for name, value in recipe.items() if name not in _NOT_SHARED}


def from_png(path: Path) -> Recipe:
    """The recipe that the PNG at `path` carries; files it was made from are looked for as seen from its folder.

    Raises InputError if it carries none, or if such a file is gone or has changed.
    """
    from fewstep import images

    settings = images.read_metadata(path)
    if "fewstep" not in settings:
        raise InputError(f"{path} does not say how fewstep drew it; `fewstep inspect {path}` shows what it holds")
    recipe = {name: value for name, value in settings.items() if value is not None and name != "fewstep"}
    for name in MODELS:
        if str(recipe.get(name, "")).startswith("."):
            recipe[name] = str(path.parent / recipe[name])
    for name in PICTURES:
        digest = recipe.pop(f"{name}_sha256", None)
        if name in recipe:
            recipe[name] = _unchanged(path.parent / recipe[name], digest, path)
    return recipe


def metadata(recipe: Recipe, result: Result, folder: Path) -> Recipe:
    """The settings to write into PNG files in `folder`, all but the seed; files are named as seen from there."""
    from fewstep import __version__

    kept = {name: recipe[name] for name in ("handoff", "strength", "dtype") if name in recipe}
    kept |= {name: _seen_from(folder, recipe[name]) for name in MODELS if name in recipe}
    for name in PICTURES:
        if name in recipe:
            kept[name] = os.path.relpath(recipe[name], folder)
            kept[f"{name}_sha256"] = _sha256(recipe[name])
    return {"fewstep": __version__, **result.settings, **kept}


def _sides(asked: Mapping[str, Any]) -> Recipe:
    size = asked.get("size")
    if size is None:
        return {}
    if "width" in asked or "height" in asked:
        raise InputError(f"--size {size} and --width or --height say the same twice; give one of them")
    match = re.fullmatch(r"(\d{1,6})(?:[xX×*](\d{1,6}))?", size.strip())
    if match is None:
        raise InputError(f"--size {size!r} is not WIDTHxHEIGHT in pixels, as 512x768, or one number for a square")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def _check(recipe: Recipe) -> None:
    if "prompt" not in recipe:
        raise InputError('no prompt; say what to draw, as in: fewstep generate "a red cube"')
    if "mask" in recipe and "init" not in recipe:
        raise InputError("--mask without --init; give the picture whose white places in the mask are redrawn")
    if "handoff" in recipe and "refiner" not in recipe:
        raise InputError("--handoff without --refiner; name the model that takes over")
    if "strength" in recipe and not {"init", "refiner"} & set(recipe):
        raise InputError("--strength without --init; give the picture to start from")
    if "strength" in recipe and "handoff" in recipe and "init" not in recipe:
        raise InputError("--handoff and --strength are two ways to refine; give one of them")
    for name in PICTURES:
        if name in recipe and not Path(recipe[name]).is_file():
            raise InputError(f"--{name} {recipe[name]}: there is no such file")


def _unchanged(file: Path, digest: str | None, png: Path) -> Path:
    if not file.is_file():
        raise InputError(f"{png} was drawn from {file}, which is not there; give it with --init or --mask")
    if digest and _sha256(file) != digest:
        raise InputError(f"{png} was drawn from {file}, which has changed since; give the old one with --init or --mask")
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seen_from(folder: Path, model: str) -> str:
    """A path of weights as seen from `folder`, told from a name by its leading dot; a name unchanged."""
    return os.path.join(".", os.path.relpath(model, folder)) if Path(model).exists() else model
