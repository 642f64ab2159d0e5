"""The models of a comparison: how they are written on the command line, and the pictures that they draw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.errors import InputError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from fewstep import Pipeline, Progress
    from fewstep.compare.study import Drawing

BATCH = 4
SETTINGS: dict[str, type[int] | type[float] | type[str]] = {
    "steps": int,
    "guidance_scale": float,
    "sampler": str,
    "schedule": str,
    "eta": float,
    "width": int,
    "height": int,
}
"""What can be set for one of the models, and its type."""
SAID_ELSEWHERE = ("task", "model", "prompt", "seed")


class Contender(NamedTuple):
    """One side of a comparison: its name on charts, the model, and what it is told instead of its defaults."""

    label: str
    model: str
    settings: dict[str, Any]


def parsed(texts: Sequence[str]) -> list[Contender]:
    """The contenders written as MODEL or MODEL:name=value,name=value.

    Raises InputError for fewer than two, for unknown settings, and for two that would be called the same.
    """
    if len(texts) < 2:
        raise InputError(f"{len(texts)} models; name two or more, as: fewstep compare blocks-base blocks-base:steps=2")
    found = [_contender(text) for text in texts]
    labels = [one.label for one in found]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two models would be called {label!r}; give one a setting, or its folder another name")
    return found


def _contender(text: str) -> Contender:
    model, *given = re.split(r":(?=[a-z_]+=)", text, maxsplit=1)  # paths may hold a colon
    settings = dict(_setting(part, text) for part in given[0].split(",")) if given else {}
    name = Path(model).name if Path(model).exists() else model
    return Contender(":".join([name, *given]), model, settings)


def _setting(part: str, text: str) -> tuple[str, Any]:
    name, _, value = part.strip().partition("=")
    if name not in SETTINGS:
        raise InputError(f"{text!r}: {unknown('setting', name, SETTINGS)}")
    try:
        return name, SETTINGS[name](value)
    except ValueError as error:
        raise InputError(f"{text!r}: {name} {value!r} is not a number") from error


def drawing(
    pipe: Pipeline, one: Contender, prompts: Sequence[str], *, seed: int, on_step: Callable[[Progress], None]
) -> Drawing:
    """The pictures of `prompts` by `pipe`, that of prompt i from seed + i."""
    from fewstep.compare.study import Drawing

    pictures: list[Image] = []
    settings: dict[str, Any] = {}
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        seeds = range(seed + start, seed + start + len(part))
        result = pipe.text_to_image(part, seed=seeds, on_step=on_step, **one.settings)
        pictures += result.images
        settings = {name: value for name, value in result.settings.items() if name not in SAID_ELSEWHERE}
    return Drawing(settings={"model": one.model, **settings}, pictures=pictures)
