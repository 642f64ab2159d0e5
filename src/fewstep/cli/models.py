"""`fewstep models`: the catalogue as a table."""

from __future__ import annotations

import json
import sys
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
    from fewstep.weights.fetch import is_cached

    return {
        "name": entry.name,
        "kind": KINDS[entry.family],
        "source": entry.source,
        "megabytes": entry.megabytes,
        "licence": entry.licence,
        "terms": entry.terms,
        "cached": "embedded" if entry.source is None else "yes" if is_cached(entry) else "no",
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    table.add_column("source", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    table.add_column("cached", no_wrap=True)
    for row in rows:
        size = f"{row['megabytes']:,} MB" if row["megabytes"] else ""
        table.add_row(row["name"], row["kind"], row["source"] or "", size, row["licence"], row["cached"])
    Console(width=None if sys.stdout.isatty() else 200).print(table)
