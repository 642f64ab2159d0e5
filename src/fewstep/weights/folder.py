"""A model's folder in diffusers' layout: its settings, its parts, and which of their files to read; without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from fewstep.errors import CheckpointError, quoted
from fewstep.files import file_size

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LARGEST_CONFIG = 1_000_000  # bytes; an index of shards has 0.1 million
MOST_SHARDS = 100
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if there is none, or it is over 1 MB."""
    try:
        if (size := file_size(path)) > LARGEST_CONFIG:
            raise CheckpointError(f"{path} is {size:,} bytes; a config has at most {LARGEST_CONFIG:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {quoted(str(error), 200)[1:-1]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parsed(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of the JSON object in `path`; CheckpointError if it makes nothing of it."""
    config = read_json(path)
    try:
        return parse(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path} lacks a setting or has one of another kind: {quoted(error)}") from error


def parts_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the networks that a model_index.json lists, text towers in their order."""
    return tuple(name for name in NETWORKS if isinstance(index.get(name), list) and any(index[name]))


def weight_file(names: Iterable[str], *, half: bool) -> str | None:
    """Which of a part's file `names` to load: a file of weights or the index of its shards; None without any.

    Safetensors before pickles; the fp16 variant first when `half`, else only where nothing else is.
    """
    present, variants = set(names), (".fp16", "") if half else ("", ".fp16")
    for ending, variant, stem in product(("safetensors", "bin"), variants, _STEMS):
        single = f"{stem}{variant}.{ending}"
        for name in (single, f"{single}.index.json", f"{stem}.{ending}.index{variant}.json"):
            if name in present:
                return name
    return None


def weight_files(folder: Path, *, half: bool) -> list[Path]:
    """The files to read of one part's folder: a file of weights, or the index of its shards and all that it names.

    CheckpointError without any, or for a shard whose name leaves the folder.
    """
    chosen = weight_file((path.name for path in folder.glob("*") if path.exists()), half=half)
    if chosen is None:
        raise CheckpointError(f"{folder} has no file of weights (.safetensors or .bin); is the folder complete?")
    path = folder / chosen
    if ".index." not in chosen:
        return [path]
    places = read_json(path).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) and places else [""]
    if len(names) > MOST_SHARDS:
        raise CheckpointError(f"{path} names {len(names):,} shards; at most {MOST_SHARDS} are read")
    for name in names:
        if name in ("", "..") or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path} names the shard {quoted(name)}; expected names of files beside it")
    return [path, *(folder / name for name in names)]
