"""What is known of the models of the catalogue, without loading one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.models.zoo import Defaults, Entry
from fewstep.weights.fetch import ASSETS, cached_folder, is_cached
from fewstep.weights.folder import read_json

KINDS = {
    "blocks": "text to image, coloured blocks",
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "refiner for Stable Diffusion XL",
    "tiny": "fast decoder",
}
"""What the models of a family generate."""
PROMPT = "a red cube on top of a blue sphere"


def table_row(entry: Entry) -> dict[str, Any]:
    """A model's row in the table of models."""
    return {
        "name": entry.name,
        "draws": KINDS[entry.family],
        "source": entry.source,
        "megabytes": entry.megabytes,
        "licence": entry.licence,
        "terms": entry.terms,
        "cached": "embedded" if entry.source is None else "yes" if is_cached(entry) else "no",
    }


def details(entry: Entry) -> dict[str, Any]:
    """A model's row, its default settings, and the words that it knows."""
    defaults = defaults_of(entry)
    settings: dict[str, Any] = {} if defaults is None else {"defaults": dict(vars(defaults))}
    return {**table_row(entry), **settings, **(_words() if entry.family == "blocks" else {})}


def defaults_of(entry: Entry | None) -> Defaults | None:
    """The default settings of a model of the catalogue; None for other models, and where nothing states them."""
    if entry is None or entry.defaults is not None or entry.family != "blocks":
        return None if entry is None else entry.defaults
    return Defaults(**read_json(ASSETS / entry.name / "model_index.json")["_fewstep"]["defaults"])


def folder_of(entry: Entry) -> Path | None:
    """The folder of a model's files; None for a model that is not on this machine."""
    return ASSETS / entry.name if entry.source is None else cached_folder(entry.source)


def _words() -> dict[str, Any]:
    """The vocabulary of the block models by kind, and a prompt made of it."""
    from fewstep.blockworld import COLOURS, RELATIONS, SHAPES, SIZES, vocabulary

    kinds = {"shapes": SHAPES, "colours": COLOURS, "sizes": SIZES, "relations": RELATIONS[1:]}
    listed = {word for names in kinds.values() for name in names for word in name.split()}
    others = [word for word in vocabulary() if word not in listed]
    return {"words": {**{kind: list(names) for kind, names in kinds.items()}, "others": others}, "prompt": PROMPT}
