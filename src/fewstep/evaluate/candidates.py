"""The models of an evaluation, each with what it is drawn with: `blocks-base`, `blocks-turbo:steps=4`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fewstep.errors import InputError, unknown
from fewstep.evaluate.image_cache import Drawn, Easel
from fewstep.pipeline.request import TaskOptions
from fewstep.tables import Cell

FEW = (1, 4)
"""Steps at which a few-step model is examined, and beside it the model that was not distilled."""
SETTINGS: dict[str, type] = {"steps": int, "guidance_scale": float, "sampler": str, "schedule": str}

SetUp = Callable[[str], Easel]
"""From a model's name to its easel."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model, and what it is drawn with where that is not its default."""

    easel: Easel
    options: TaskOptions

    @property
    def label(self) -> str:
        """`blocks-turbo, 4 steps`, with the other settings that are not the model's own."""
        steps = self.options.get("steps") or self.easel.pipe.parts.defaults.steps
        others = [f"{name} {value}" for name, value in self.options.items() if name != "steps"]
        return ", ".join([self.easel.name, f"{steps} step{'s' * (steps > 1)}", *others])

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """As `Easel.draw`."""
        return self.easel.draw(prompts, seeds, self.options)

    def row(self, drawings: Sequence[Drawn]) -> dict[str, Cell]:
        """How it drew: a line of a table."""
        parts, told = self.easel.pipe.parts, drawings[0].settings
        fresh, seconds = sum(drawn.fresh for drawn in drawings), sum(drawn.seconds for drawn in drawings)
        networks = (parts.unet, parts.autoencoder, *parts.text_encoders)
        return {
            "model": self.label,
            "weights": self.easel.digest,
            "parameters": sum(p.numel() for network in networks for p in network.parameters()),
            "sampler": f"{told['sampler']} ({told['schedule']})",
            "guidance": f"{told['guidance_scale']:g}",
            "pixels": f"{told['width']} x {told['height']}",
            "black": sum(drawn.black for drawn in drawings),
            "pictures/s": fresh / seconds if fresh else None,
        }


def contestants(texts: Sequence[str], base: str, set_up: SetUp) -> list[Contestant]:
    """The models written as MODEL or MODEL:name=value,..., first of all `base`; each model is set up once.

    A model that draws in at most 4 steps by default is taken at 1 and at 4, and then `base` too, beside its own
    default: that shows what distilling gave. InputError for a setting that is unknown.
    """
    asked = [_parsed(text) for text in dict.fromkeys([base, *texts])]
    easels = {name: set_up(name) for name in dict.fromkeys(name for name, _ in asked)}
    quick = {name for name, easel in easels.items() if easel.pipe.parts.defaults.steps <= max(FEW)}
    plans = list[tuple[str, TaskOptions]]()
    for name, options in asked:
        plans += _at_few(name) if name in quick and not options else [(name, options)]
    if quick - {asked[0][0]}:
        plans += _at_few(asked[0][0])
    once = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]
    return [Contestant(easel=easels[name], options=options) for name, options in once]


def _at_few(name: str) -> list[tuple[str, TaskOptions]]:
    return [(name, {"steps": steps}) for steps in FEW]


def _parsed(text: str) -> tuple[str, TaskOptions]:
    """The model and its settings."""
    model, *given = re.split(r":(?=[a-z_]+=)", text, maxsplit=1)  # paths may hold a colon
    options = dict[str, Any]()
    for part in given[0].split(",") if given else ():
        name, _, value = part.partition("=")
        if name not in SETTINGS:
            raise InputError(f"{text!r}: {unknown('setting', name, SETTINGS)}")
        try:
            options[name] = SETTINGS[name](value)
        except ValueError:
            raise InputError(f"{text!r}: {name} {value!r} is not a number") from None
    return model, cast(TaskOptions, options)
