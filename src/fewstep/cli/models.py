"""`fewstep models`: the catalogue as a table, and one model of it with all that is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli import checks

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
PROMPT = "a red cube on top of a blue sphere"


def models(
    name: Annotated[str | None, typer.Argument(help="One of them, with all that is known.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the models that have a name, with size, licence and whether they are here; or show one of them."""
    from fewstep.cli.inspect import table
    from fewstep.models.zoo import CATALOGUE, entry

    found: Any = [_row(known) for known in CATALOGUE.values()] if name is None else details(entry(name))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif name is None:
        _print_table(found)
    else:
        typer.echo(table(found))


def details(known: Entry) -> dict[str, Any]:
    """What there is to know about a model: the table's row, what it draws with, and the words that it knows."""
    native = checks.defaults_of(known)
    drawing: dict[str, Any] = {} if native is None else {"defaults": dict(vars(native))}
    return {**_row(known), **drawing, **(_words() if known.family == "blocks" else {})}


def folder_of(known: Entry) -> Path | None:
    """Where the files of a model are; None for one that is not here."""
    from fewstep.weights.fetch import ASSETS, cached_folder

    return ASSETS / known.name if known.source is None else cached_folder(known.source)


def _words() -> dict[str, Any]:
    """The words of the blocks models by what they say, and a prompt made of them."""
    from fewstep.blockworld import COLOURS, RELATIONS, SHAPES, SIZES, vocabulary

    kinds = {"shapes": SHAPES, "colours": COLOURS, "sizes": SIZES, "relations": RELATIONS[1:]}
    listed = {word for names in kinds.values() for name in names for word in name.split()}
    others = [word for word in vocabulary() if word not in listed]
    return {"words": {**{kind: list(names) for kind, names in kinds.items()}, "others": others}, "prompt": PROMPT}


def _row(entry: Entry) -> dict[str, Any]:
    from fewstep.weights.fetch import is_cached

    return {
        "name": entry.name,
        "draws": KINDS[entry.family],
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
        table.add_row(row["name"], row["draws"], row["source"] or "", size, row["licence"], row["cached"])
    Console(width=None if sys.stdout.isatty() else 200).print(table)
