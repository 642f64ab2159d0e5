"""What is in a diffusers folder: its parts, their config files, and which files of weights to take; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import CheckpointError

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LARGEST_CONFIG = 4_000_000  # bytes
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if there is none, or it is over 4 MB."""
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise CheckpointError(f"{path} is {path.stat().st_size:,} bytes; a config has at most {LARGEST_CONFIG:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parts_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the networks that a model_index.json lists, text towers in their order."""

    def present(name: str) -> bool:
        value = index.get(name)
        return isinstance(value, list) and any(value)

    return tuple(name for name in NETWORKS if present(name))


def weight_file(names: Iterable[str], *, half: bool) -> str | None:
    """Which of a part's file `names` to load: a file of weights or the index of its shards; None without any.

    Safetensors before pickles; the fp16 variant first when `half`, else only where nothing else is.
    """
    present = set(names)
    variants = (".fp16", "") if half else ("", ".fp16")
    for ending in ("safetensors", "bin"):
        for variant in variants:
            for stem in _STEMS:
                single = f"{stem}{variant}.{ending}"
                indexes = (f"{single}.index.json", f"{stem}.{ending}.index{variant}.json")
                for name in (single, *indexes):
                    if name in present:
                        return name
    return None


def shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names, beside it; CheckpointError for a name that leaves the folder."""
    places = read_json(index).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) and places else [""]
    for name in names:
        if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} names the shard {name!r}; expected names of files beside it")
    return tuple(index.with_name(name) for name in names)
