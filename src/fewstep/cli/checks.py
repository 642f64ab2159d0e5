"""Checks of a run's settings before a model is loaded or fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewstep.cli.settings import refines_finished_image, task_keywords
from fewstep.errors import InputError, quoted, unknown
from fewstep.safety.provenance import Settings

if TYPE_CHECKING:
    from fewstep.models.zoo import Defaults, Entry

LATENTS = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "sdxl-refiner": "sdxl", "blocks": "blocks"}
"""Families with the same latents have the same name here: a refiner takes over latents of its own kind."""


def check(settings: Settings) -> None:
    """InputError for values out of range, unknown names, and models that do not go together; loads nothing."""
    from fewstep.inspect.catalogue import defaults_of
    from fewstep.pipeline.load import EMBEDDED
    from fewstep.pipeline.request import TaskOptions, make_request, strength_steps

    model = _entry(settings.get("model", EMBEDDED))
    _check_kinds(settings, model)
    native = defaults_of(model)
    keywords = task_keywords(settings)
    options: Any = {name: value for name, value in keywords.items() if name in TaskOptions.__annotations__}
    job = make_request(keywords["prompt"], options, native or _any(), multiple=8 if model else 1)
    if "strength" in keywords:
        strength_steps(job.steps if native or "steps" in settings else 1000, keywords["strength"])
    if not 0 <= settings.get("handoff", 0.8) <= 1:
        raise InputError(f"handoff {quoted(settings['handoff'])} is not a number from 0 to 1")


def _entry(name: str) -> Entry | None:
    from fewstep.models.zoo import CATALOGUE

    return CATALOGUE.get(name)


def _any() -> Defaults:
    """Values that are right for every model: those that are not given are checked when it is loaded."""
    from fewstep.models.zoo import Defaults

    return Defaults(guidance_scale=1.0, sampler="euler", width=512, height=512)


def _check_kinds(settings: Settings, model: Entry | None) -> None:
    """InputError for a decoder in a model's place, a model in a decoder's, or a refiner of another latent space."""
    from fewstep.models.zoo import TINY_NAMES
    from fewstep.weights.scheduler import PREDICTIONS

    refiner, decoder = _entry(settings.get("refiner", "")), _entry(settings.get("decoder", ""))
    for option, known in (("model", model), ("refiner", refiner)):
        if known is not None and known.family == "tiny":
            raise InputError(f"--{option} {known.name} is a decoder alone, not a model; give it with --decoder")
    if decoder is not None and decoder.family != "tiny":
        raise InputError(f"--decoder {decoder.name} is a whole model; the decoders are tiny, {', '.join(TINY_NAMES)}")
    if "prediction" in settings and settings["prediction"] not in PREDICTIONS:
        raise InputError(unknown("prediction", settings["prediction"], PREDICTIONS))
    if model is None or refiner is None or refines_finished_image(settings):
        return
    if LATENTS[model.family] != LATENTS[refiner.family]:
        raise InputError(
            f"--refiner {refiner.name} cannot go on with what {model.name} leaves, which are other latents; choose two "
            "models of one family, or add --strength 0.3 to have the finished image regenerated"
        )
