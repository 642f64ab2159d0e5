"""`fewstep models`: the catalogue as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fewstep.models.zoo import Entry

KINDS = {
    "blocks": "text to image, coloured blocks",
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "refiner for Stable Diffusion XL",
    "tiny": "fast decoder",
}


def models(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the models that have a name, with size, licence and whether they are here."""
    from fewstep.models.zoo import CATALOGUE

    rows = [_row(entry) for entry in CATALOGUE.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": KINDS[entry.family],
        "source": entry.source,
        "megabytes": entry.megabytes,
        "licence": entry.licence,
        "terms": entry.terms,
        "cached": "embedded" if entry.source is None else "yes" if _cached(entry.source) else "no",
    }
