"""What makes a picture, as a dict of settings: from the command's options, from a PNG, and into one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import InputError

Recipe = dict[str, Any]

MODELS = ("model", "refiner", "tokenizer", "decoder")  # names or paths
HOW = ("dtype", "revision", "prediction")  # they are loaded
PICTURES = ("init", "mask")  # that a recipe reads
TEXTS = ("prompt", "negative_prompt", "sampler", "schedule", *HOW, *MODELS, *PICTURES)
NUMBERS = ("steps", "guidance_scale", "guidance_rescale", "eta", "strength", "handoff", "width", "height", "seed")


def complete(asked: Mapping[str, Any]) -> Recipe:
    """The recipe that the options `asked` describe, over that of the PNG `like` if there is one.

    Raises InputError for options that do not go together and files that are not there.
    """
    recipe = {name: value for name, value in asked.items() if name not in ("like", "size", "images")}
    recipe |= _sides(asked)
    if "lora" in asked:
        recipe["lora"] = [_lora(text) for text in asked["lora"]]
    if "images" in asked:
        recipe["images_per_prompt"] = asked["images"]
    if "like" in asked:
        recipe = from_png(asked["like"], instead=recipe)
    _check(recipe)
    return recipe


def redraws(recipe: Recipe) -> bool:
    """Whether the refiner redraws the finished picture, instead of taking over before it is finished."""
    return "refiner" in recipe and "strength" in recipe and "init" not in recipe


def keywords(recipe: Recipe) -> Recipe:
    """The keywords of `Pipeline.start`, but for the refiner."""
    known = {name: value for name, value in recipe.items() if name not in (*MODELS, *HOW, "lora", "device")}
    if "init" in known:
        known["image"] = known.pop("init")
        known.setdefault("strength", 1.0 if "mask" in known else 0.8)
    return known


def from_png(path: Path, instead: Mapping[str, Any]) -> Recipe:
    """The recipe that the PNG at `path` carries, but for the entries `instead`; paths in it start at its folder.

    Raises InputError if it carries none, one of another version, or if a file it names is gone or has changed.
    """
    from fewstep import images

    found = images.read_metadata(path)
    if found is None or "fewstep" not in found:
        raise InputError(f"{path} does not say how fewstep drew it; fewstep inspect shows what it does say")
    digests = {name: found.pop(f"{name}_sha256", None) for name in PICTURES}
    recipe = {name: value for name, value in found.items() if value is not None and name not in instead}
    for name in ("fewstep", "task"):
        recipe.pop(name, None)
    _check_kinds(recipe, f"{path}, by fewstep {found['fewstep']},")
    for name in MODELS:
        if str(recipe.get(name, "")).startswith("."):
            recipe[name] = str(path.parent / recipe[name])
    for name in PICTURES:
        if name in recipe:
            recipe[name] = _unchanged(path.parent / recipe[name], digests[name], path, f"--{name}")
    if "lora" in recipe:
        entries = [(path.parent / entry["file"], entry) for entry in recipe["lora"]]
        recipe["lora"] = [(_unchanged(f, entry["sha256"], path, "--lora"), entry["scale"]) for f, entry in entries]
    return recipe | dict(instead)


def metadata(recipe: Recipe, settings: Mapping[str, Any], folder: Path) -> Recipe:
    """What to write into PNG files in `folder`: a result's `settings`, and files as seen from there."""
    from fewstep import __version__

    kept: Recipe = {name: recipe[name] for name in ("strength", *HOW) if name in recipe}
    kept |= {name: _seen_from(folder, str(recipe[name])) for name in MODELS if name in recipe}
    for name in PICTURES:
        if name in recipe:
            kept[name] = _relative(recipe[name], folder)
            kept[f"{name}_sha256"] = _sha256(recipe[name])
    if "lora" in recipe:
        kept["lora"] = [
            {"file": _relative(file, folder), "scale": scale, "sha256": _sha256(file)} for file, scale in recipe["lora"]
        ]
    return {"fewstep": __version__, **settings, **kept}


def _lora(text: str) -> tuple[Path, float]:
    """The file and the scale of FILE[:SCALE]; a colon may be part of the file's name."""
    file, _, number = text.rpartition(":")
    try:
        found = Path(file), float(number)
    except ValueError:
        found = Path(text), 1.0
    if not found[0].is_file():
        raise InputError(f"--lora {text}: there is no file {found[0]}; give FILE or FILE:SCALE")
    return found


def _sides(asked: Mapping[str, Any]) -> Recipe:
    size = asked.get("size")
    if size is None:
        return {}
    if "width" in asked or "height" in asked:
        raise InputError(f"--size {size} and --width or --height say the same twice; give one of them")
    match = re.fullmatch(r"(\d{1,6})(?:[xX×*](\d{1,6}))?", size.strip())
    if match is None:
        raise InputError(f"--size {size!r} is not WIDTHxHEIGHT in pixels, as 512x768, or 512 for a square")
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


def _check_kinds(recipe: Recipe, source: str) -> None:
    """A picture may come from anybody, or from a later version."""
    for name, value in recipe.items():
        kind = str if name in TEXTS else int | float if name in NUMBERS else ()
        if not (_are_loras(value) if name == "lora" else isinstance(value, kind)):
            raise InputError(f"{source} says {name} = {value!r}, which is unknown here")


def _are_loras(value: Any) -> bool:
    kinds = {"file": str, "scale": int | float, "sha256": str}
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() == kinds.keys()
        and all(isinstance(entry[name], kind) for name, kind in kinds.items())
        for entry in value
    )


def _unchanged(file: Path, digest: str | None, png: Path, option: str) -> Path:
    if not file.is_file():
        raise InputError(f"{png} was drawn with {file}, which is not there; give it with {option}")
    if digest and _sha256(file) != digest:
        raise InputError(f"{png} was drawn with {file}, which has changed; give it with {option}")
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seen_from(folder: Path, model: str) -> str:
    """A path of weights as seen from `folder`, told from a name by its leading dot; a name unchanged."""
    from fewstep.models.zoo import CATALOGUE

    named = model in CATALOGUE or not Path(model).exists()
    return model if named else f"./{_relative(model, folder)}"


def _relative(path: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
