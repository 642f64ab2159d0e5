"""What makes a picture, as a dict of settings: from the command's options, from a PNG, and into one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import InputError, quoted
from fewstep.files import checksum

Settings = dict[str, Any]

MODELS = ("model", "refiner", "tokenizer", "decoder")  # names or paths
HOW = ("dtype", "revision", "prediction")  # they are loaded
PICTURES = ("init", "mask")  # that a settings reads
TEXTS = ("prompt", "negative_prompt", "sampler", "schedule", *HOW, *MODELS, *PICTURES)
FILES = (*MODELS, *PICTURES)  # whose names may be of bytes that are no text
NUMBERS = ("steps", "guidance_scale", "guidance_rescale", "eta", "strength", "handoff", "width", "height", "seed")


def complete_settings(asked: Mapping[str, Any]) -> Settings:
    """The settings that the options `asked` describe, over those of the picture `like` if there is one.

    Raises InputError for options that do not go together, files that are not there and models that nobody knows.
    """
    settings = {name: value for name, value in asked.items() if name not in ("like", "size", "images")}
    settings |= _sides(asked)
    if "lora" in asked:
        settings["lora"] = [_lora(text) for text in asked["lora"]]
    if "images" in asked:
        settings["images_per_prompt"] = asked["images"]
    for name in ("model", "refiner", "decoder"):
        if name in settings:
            settings[name] = _known(name, settings[name])
    if "like" in asked:
        from fewstep.cli import like

        settings = like.from_picture(asked["like"], instead=settings)
    _check(settings)
    return settings


def redraws(settings: Settings) -> bool:
    """Whether the refiner redraws the finished picture, instead of taking over before it is finished."""
    return "refiner" in settings and "strength" in settings and "init" not in settings


def task_keywords(settings: Settings) -> Settings:
    """The keywords of `Pipeline.start`, but for the refiner."""
    known = {name: value for name, value in settings.items() if name not in (*MODELS, *HOW, "lora", "device")}
    if "init" in known:
        known["image"] = known.pop("init")
        known.setdefault("strength", 1.0 if "mask" in known else 0.8)
    return known


def picture_metadata(settings: Settings, result: Mapping[str, Any], folder: Path) -> Settings:
    """What to write into PNG files in `folder`: the `result`'s settings, and files as seen from there."""
    from fewstep import __version__
    from fewstep.weights.fetch import seen_from

    kept: Settings = {name: settings[name] for name in ("strength", *HOW) if name in settings}
    kept |= {name: seen_from(folder, str(settings[name])) for name in MODELS if name in settings}
    for name in PICTURES:
        if name in settings:
            kept[name] = _relative(settings[name], folder)
            kept[f"{name}_sha256"] = checksum(settings[name])
    if "lora" in settings:
        kept["lora"] = [
            {"file": _relative(file, folder), "scale": scale, "sha256": checksum(file)}
            for file, scale in settings["lora"]
        ]
    return {"fewstep": __version__, **result, **kept}


def _known(option: str, text: str) -> str:
    """The model that an option names, by its own name; a path as it is. InputError when there is none."""
    from fewstep.models.zoo import Entry
    from fewstep.weights.fetch import named

    if option == "decoder" and text == "tiny":
        return text
    found = named(text)
    return found.name if isinstance(found, Entry) else str(found)


def _lora(text: str) -> tuple[Path, float]:
    """The file and the scale of FILE[:SCALE]; a colon may be part of the file's name."""
    file, _, number = text.rpartition(":")
    try:
        found = Path(file), float(number)
    except ValueError:
        found = Path(text), 1.0
    if not found[0].is_file():
        raise InputError(f"--lora {quoted(text)}: there is no file {quoted(found[0])}; give FILE or FILE:SCALE")
    return found


def _sides(asked: Mapping[str, Any]) -> Settings:
    size = asked.get("size")
    if size is None:
        return {}
    if "width" in asked or "height" in asked:
        raise InputError(f"--size {quoted(size)} and --width or --height say the same twice; give one of them")
    match = re.fullmatch(r"(\d{1,6})(?:[xX×*](\d{1,6}))?", size.strip())
    if match is None:
        raise InputError(f"--size {quoted(size)} is not WIDTHxHEIGHT in pixels, as 512x768, or 512 for a square")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def _check(settings: Settings) -> None:
    if "prompt" not in settings:
        raise InputError('no prompt; say what to draw, as in: fewstep generate "a red cube"')
    if "mask" in settings and "init" not in settings:
        raise InputError("--mask without --init; give the picture whose white places in the mask are redrawn")
    if "handoff" in settings and "refiner" not in settings:
        raise InputError("--handoff without --refiner; name the model that takes over")
    if "strength" in settings and not {"init", "refiner"} & set(settings):
        raise InputError("--strength without --init; give the picture to start from")
    if "strength" in settings and "handoff" in settings and "init" not in settings:
        raise InputError("--handoff and --strength are two ways to refine; give one of them")
    for name in PICTURES:
        if name in settings and not Path(settings[name]).is_file():
            raise InputError(f"--{name} {quoted(settings[name])}: there is no such file")
    for name in TEXTS:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in str(settings.get(name, ""))) and name not in FILES:
            raise InputError(f"{name} {quoted(settings[name])} holds half a letter; type it again, in UTF-8")


def _relative(path: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
