"""The settings that an image carries: the names they have in its metadata, and the metadata written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.files import checksum
from fewstep.version import __version__

Settings = dict[str, Any]

MODELS = ("model", "refiner", "tokenizer", "decoder")
"""Settings that are names or paths of models."""
LOADING = ("dtype", "revision", "prediction")
"""Settings of how a model is loaded."""
IMAGES = ("init", "mask")
"""Settings that are paths of images."""
TEXTS = ("prompt", "negative_prompt", "sampler", "schedule", *LOADING, *MODELS, *IMAGES)
FILES = (*MODELS, *IMAGES)
"""Settings whose names may be of bytes that are no text."""
NUMBERS = ("steps", "guidance_scale", "guidance_rescale", "eta", "strength", "handoff", "width", "height", "seed")


def image_metadata(settings: Mapping[str, Any], result: Mapping[str, Any], folder: Path) -> Settings:
    """The metadata of images saved in `folder`: what a run resolved (`result`), and the files of `settings`.

    Files are written as paths relative to `folder`, with their SHA-256.
    """
    from fewstep.weights.fetch import seen_from

    metadata: Settings = {name: settings[name] for name in ("strength", *LOADING) if name in settings}
    metadata |= {name: seen_from(folder, str(settings[name])) for name in MODELS if name in settings}
    for name in IMAGES:
        if name in settings:
            metadata[name] = _relative(settings[name], folder)
            metadata[f"{name}_sha256"] = checksum(settings[name])
    if "lora" in settings:
        metadata["lora"] = [
            {"file": _relative(file, folder), "scale": scale, "sha256": checksum(file)}
            for file, scale in settings["lora"]
        ]
    return {"fewstep": __version__, **result, **metadata}


def _relative(path: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
