"""The settings in an image's metadata, as far as they are trusted: an image may come from anybody.

Trusted are models of the catalogue, hub ids in the cache, and files below the current folder or the image's own.
Anything else, and more work than `MOST_WORK`, has to be given on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from fewstep.errors import InputError, quoted
from fewstep.files import checksum
from fewstep.safety.provenance import IMAGES, MODELS, NUMBERS, TEXTS, Settings

MOST_PIXELS = 2**22  # 2048 x 2048
MOST_WORK = 2**28  # pixels x steps: 256 steps at 1024 x 1024, 64 at 2048 x 2048
MOST_LETTERS = 5_000  # of a prompt
MOST_LORAS = 16


def settings_of_image(path: Path, instead: Mapping[str, Any]) -> Settings:
    """The settings of the image at `path`, but for the entries `instead`; paths in it are relative to its folder.

    Raises InputError if it carries none, those of another version, if a file it names is gone or has changed, and for
    what it may not ask for.
    """
    from fewstep import images

    metadata = images.read_metadata(path)
    if metadata is None or "fewstep" not in metadata:
        raise InputError(f"{quoted(path)} carries no settings of fewstep; fewstep inspect shows what it carries")
    digests = {name: metadata.pop(f"{name}_sha256", None) for name in IMAGES}
    settings = {name: value for name, value in metadata.items() if value is not None}
    for name in ("fewstep", "task"):
        settings.pop(name, None)
    _check_kinds(settings, f"{quoted(path)}, by fewstep {quoted(metadata['fewstep'], 20)},")
    _drop_replaced(settings, instead)
    _check_work(settings, instead, path)
    for name in MODELS:
        if name in settings:
            settings[name] = _weights(name, settings[name], path, settings.get("revision"))
    for name in IMAGES:
        if name in settings:
            settings[name] = _unchanged(settings[name], digests[name], path, f"--{name}")
    if "lora" in settings:
        entries = [(_unchanged(one["file"], one["sha256"], path, "--lora"), one["scale"]) for one in settings["lora"]]
        settings["lora"] = entries
    return settings | dict(instead)


def _drop_replaced(settings: Settings, instead: Mapping[str, Any]) -> None:
    """Remove the settings that the command line gives too, and those of a model that it replaces by another."""
    given, own = instead.get("model"), settings.get("model")
    if given is not None and (own is None or Path(given).name != Path(own).name):
        for name in ("revision", "prediction", "tokenizer"):
            settings.pop(name, None)
    for name in instead:
        settings.pop(name, None)


def _check_kinds(settings: Settings, source: str) -> None:
    """InputError for unknown settings and values of a wrong type: from a later version, or from anybody."""
    for name, value in settings.items():
        number, text = name in NUMBERS and _is_number(value), name in TEXTS and isinstance(value, str)
        if not (number or text or (name == "lora" and _are_loras(value))):
            raise InputError(f"{source} says {quoted(name)[1:-1]} = {quoted(value)}, which is unknown here")


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with: neither NaN nor of thousands of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**64) < value < 2**64


def _are_loras(value: Any) -> bool:
    kinds = {"file": str, "sha256": str}
    return (
        isinstance(value, list)
        and len(value) <= MOST_LORAS
        and all(
            isinstance(entry, dict)
            and entry.keys() == {"file", "scale", "sha256"}
            and _is_number(entry["scale"])
            and all(isinstance(entry[name], kind) for name, kind in kinds.items())
            for entry in value
        )
    )


def _check_work(settings: Settings, instead: Mapping[str, Any], png: Path) -> None:
    """InputError if the image, and not the command line, asks for more work or longer texts than are trusted."""
    both = {**settings, **instead}
    steps, width, height = (both.get(name, 1) for name in ("steps", "width", "height"))
    pixels = width * height
    much = pixels > MOST_PIXELS and settings.keys() & {"width", "height"}
    if much or (pixels * steps > MOST_WORK and settings.keys() & {"steps", "width", "height"}):
        raise InputError(
            f"{quoted(png)} asks for {steps} steps at {width}x{height} pixels, which is more work than is done on an "
            f"image's word; to run it all the same add --steps {steps} --size {width}x{height}"
        )
    for name in ("prompt", "negative_prompt"):
        if len(settings.get(name, "")) > MOST_LETTERS:
            raise InputError(
                f"{quoted(png)} has a {name.replace('_', ' ')} of {len(settings[name])} letters, more than the "
                f"{MOST_LETTERS} that are read on an image's word; give one of your own"
            )


def _weights(name: str, text: str, png: Path, revision: str | None) -> str:
    """The model, refiner, decoder or tokenizer that an image names; InputError if it is not trusted."""
    from fewstep.models.zoo import CATALOGUE
    from fewstep.weights.fetch import HUB_ID, is_cached

    if text.startswith("."):
        return str(_beside(text, png, f"--{name}"))
    known = CATALOGUE.get(text)
    own = name == "decoder" and text == "tiny"
    trusted = own or (known is not None and (known.source is None or revision is None))
    cached = HUB_ID.fullmatch(text) is not None or known is not None
    if name != "tokenizer" and (trusted or (cached and is_cached(known or text, revision))):
        return text
    of = f" (revision {quoted(revision)})" if revision is not None else ""
    raise InputError(
        f"{quoted(png)} names the {name} {quoted(text)}{of}, which is neither in the catalogue nor in the cache: it is "
        f"not loaded on an image's word; give the one that you want with --{name}"
    )


def _beside(text: str, png: Path, option: str) -> Path:
    """The path that an image names, relative to its folder; InputError if it leads out of that and the current one."""
    foreign = PureWindowsPath(text)
    plain = not (foreign.drive or foreign.root or text.startswith("~") or "\\" in text or "\0" in text)
    home = png.absolute().parent
    path = Path(os.path.normpath(home / text))
    if not plain or not any(path.is_relative_to(os.path.normpath(near)) for near in (home, Path.cwd())):
        raise InputError(
            f"{quoted(png)} names {quoted(text)}, which is not below its folder or the current one: it is not opened "
            f"on an image's word; give the file that you want with {option}"
        )
    return Path(os.path.relpath(path))


def _unchanged(text: str, digest: Any, png: Path, option: str) -> Path:
    file = _beside(text, png, option)
    if not file.is_file():
        raise InputError(f"{quoted(png)} was generated with {quoted(file)}, which is not there; give it with {option}")
    if digest and checksum(file) != digest:
        raise InputError(f"{quoted(png)} was generated with {quoted(file)}, which has changed; give it with {option}")
    return file
