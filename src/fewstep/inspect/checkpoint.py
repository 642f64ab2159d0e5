"""What a file or folder of weights is, by the names and shapes of its tensors; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from fewstep.errors import CheckpointError
from fewstep.formats.tensors import TensorFile
from fewstep.models.config import UNetConfig
from fewstep.weights.folder import parsed, parts_of, read_json
from fewstep.weights.layouts import AUTOENCODER_PREFIX, TEXT_PREFIXES, UNET_PREFIX
from fewstep.weights.load import open_part, open_tensors, read_scheduler
from fewstep.weights.model import family_of
from fewstep.weights.single import recognise

Description = dict[str, Any]


def describe(path: Path) -> Description:
    """The family, layout, parts and notes of the checkpoint at `path`; CheckpointError if it is none."""
    if not path.is_dir():
        return _single_file(path)
    if (path / "model_index.json").is_file():
        return _model(path)
    if (path / "config.json").is_file():
        return _network(path)
    if (path / "lora.safetensors").is_file():
        content = _single_file(path / "lora.safetensors")
        return {**content, "parts": {"lora": content["parts"]["all"]}}
    raise CheckpointError(f"{path} has no model_index.json, so it is not a diffusers folder; name a file in it")


def _model(folder: Path) -> Description:
    index = read_json(folder / "model_index.json")
    entry = index.get("_fewstep")
    notes = entry if isinstance(entry, dict) else {}
    unet = parsed(folder / "unet" / "config.json", UNetConfig.from_diffusers)
    scheduler = read_scheduler(folder / "scheduler", unet)
    own = [
        name for name in parts_of(index) if "base" not in notes or (folder / name).is_dir()
    ]  # the rest is the base's
    parts = {name: open_part(folder / name) for name in own}
    return {
        "family": notes.get("family", family_of(unet)),
        "layout": f"diffusers folder of a {index.get('_class_name')}",
        "parts": {name: _counts(file, file.shapes) for name, file in parts.items()},
        "prediction": scheduler.prediction,
        "inpainting": unet.in_channels == 9,
        "licence": notes.get("licence"),
    }


def _network(folder: Path) -> Description:
    name, file = read_json(folder / "config.json").get("_class_name"), open_part(folder)
    return {"family": None, "layout": f"one {name}", "parts": {folder.name: _counts(file, file.shapes)}}


def _single_file(path: Path) -> Description:
    file = open_tensors(path)
    notes = {"licence": file.notes.get("modelspec.license"), "notes": dict(file.notes)}
    try:
        contents = recognise(file)
    except CheckpointError as error:
        what = str(error).removeprefix(f"{path} is ").partition(";")[0]
        return {"family": None, "layout": what, "parts": {"all": _counts(file, file.shapes)}, **notes}
    return {
        "family": contents.family,
        "layout": "original single file",
        "parts": _prefixed(file, contents.family),
        "inpainting": contents.unet.in_channels == 9,
        **notes,
    }


def _prefixed(file: TensorFile, family: str) -> Description:
    """The parts of an original single file by the beginnings of their names; averages and constants are `other`."""
    prefixes = {"unet": UNET_PREFIX, "vae": AUTOENCODER_PREFIX}
    towers = next(starts for name, starts in TEXT_PREFIXES.items() if name == family)
    prefixes |= dict(zip(("text_encoder", "text_encoder_2"), towers, strict=False))
    named = {part: [key for key in file.shapes if key.startswith(start)] for part, start in prefixes.items()}
    others = file.shapes.keys() - {key for keys in named.values() for key in keys}
    return {part: _counts(file, keys) for part, keys in {**named, "other": others}.items() if keys}


def _counts(file: TensorFile, keys: Iterable[str]) -> Description:
    """How many numbers the tensors called `keys` hold, and their formats, the commonest first."""
    sizes: Counter[str] = Counter()
    for key in keys:
        sizes[str(file.dtypes[key]).removeprefix("torch.")] += prod(file.shapes[key])
    return {"parameters": sizes.total(), "dtypes": [name for name, _ in sizes.most_common()]}
