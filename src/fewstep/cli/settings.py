"""The settings of a run, from the command's options and from an image's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import InputError, quoted
from fewstep.safety.provenance import FILES, IMAGES, LOADING, MODELS, TEXTS, Settings


def complete_settings(given: Mapping[str, Any]) -> Settings:
    """The settings of the options `given`, over those of the image `like` if there is one.

    Raises InputError for options that do not go together, files that are not there and models that nobody knows.
    """
    settings = {name: value for name, value in given.items() if name not in ("like", "size", "images")}
    settings |= _sides(given)
    if "lora" in given:
        settings["lora"] = [_lora(text) for text in given["lora"]]
    if "images" in given:
        settings["images_per_prompt"] = given["images"]
    for name in ("model", "refiner", "decoder"):
        if name in settings:
            settings[name] = _known(name, settings[name])
    if "like" in given:
        from fewstep.safety.trusted_settings import settings_of_image

        settings = settings_of_image(given["like"], instead=settings)
    _check(settings)
    return settings


def refines_finished_image(settings: Settings) -> bool:
    """Whether the refiner regenerates the finished image, instead of taking over before it is finished."""
    return "refiner" in settings and "strength" in settings and "init" not in settings


def task_keywords(settings: Settings) -> Settings:
    """The keywords of `Pipeline.start`, but for the refiner."""
    keywords = {name: value for name, value in settings.items() if name not in (*MODELS, *LOADING, "lora", "device")}
    if "init" in keywords:
        keywords["image"] = keywords.pop("init")
        keywords.setdefault("strength", 1.0 if "mask" in keywords else 0.8)
    return keywords


def _known(option: str, text: str) -> str:
    """The model that an option names, by its own name; a path as it is. InputError when there is none."""
    from fewstep.models.zoo import Entry
    from fewstep.weights.fetch import named

    if option == "decoder" and text == "tiny":
        return text
    model = named(text)
    return model.name if isinstance(model, Entry) else str(model)


def _lora(text: str) -> tuple[Path, float]:
    """The file and the scale of FILE[:SCALE]; a colon may be part of the file's name."""
    file, _, number = text.rpartition(":")
    try:
        path, scale = Path(file), float(number)
    except ValueError:
        path, scale = Path(text), 1.0
    if not path.is_file():
        raise InputError(f"--lora {quoted(text)}: there is no file {quoted(path)}; give FILE or FILE:SCALE")
    return path, scale


def _sides(given: Mapping[str, Any]) -> Settings:
    size = given.get("size")
    if size is None:
        return {}
    if "width" in given or "height" in given:
        raise InputError(f"--size {quoted(size)} and --width or --height say the same twice; give one of them")
    match = re.fullmatch(r"(\d{1,6})(?:[xX×*](\d{1,6}))?", size.strip())
    if match is None:
        raise InputError(f"--size {quoted(size)} is not WIDTHxHEIGHT in pixels, as 512x768, or 512 for a square")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def _check(settings: Settings) -> None:
    if "prompt" not in settings:
        raise InputError('no prompt; say what the image shows, as in: fewstep generate "a red cube"')
    if "mask" in settings and "init" not in settings:
        raise InputError("--mask without --init; give the image whose white places in the mask are changed")
    if "handoff" in settings and "refiner" not in settings:
        raise InputError("--handoff without --refiner; name the model that takes over")
    if "strength" in settings and not {"init", "refiner"} & set(settings):
        raise InputError("--strength without --init; give the image to start from")
    if "strength" in settings and "handoff" in settings and "init" not in settings:
        raise InputError("--handoff and --strength are two ways to refine; give one of them")
    for name in IMAGES:
        if name in settings and not Path(settings[name]).is_file():
            raise InputError(f"--{name} {quoted(settings[name])}: there is no such file")
    for name in TEXTS:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in str(settings.get(name, ""))) and name not in FILES:
            raise InputError(f"{name} {quoted(settings[name])} holds half a letter; type it again, in UTF-8")
