"""Models of the catalogue that are a LoRA on another one, as they come with fewstep."""

from __future__ import annotations

from dataclasses import replace

from fewstep.adapters.merge import fuse_lora
from fewstep.adapters.read import read_lora
from fewstep.models.zoo import Entry
from fewstep.weights.fetch import ASSETS
from fewstep.weights.parts import Parts

FILE = "lora.safetensors"


def edition(parts: Parts, known: Entry) -> Parts:
    """`parts`, the base of `known`, with its LoRA merged for good, under its name and with its defaults."""
    fuse_lora(parts, read_lora(ASSETS / known.name / FILE, parts))
    defaults = known.defaults or parts.defaults
    scheduler = replace(parts.scheduler, sampler=defaults.sampler, spacing=defaults.schedule)
    return replace(parts, name=known.name, licence=known.licence, defaults=defaults, scheduler=scheduler)
