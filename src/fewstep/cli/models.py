"""`fewstep models`: the catalogue as a table, or one model with all that is known of it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer


def models(
    name: Annotated[str | None, typer.Argument(help="One of them, with all that is known.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the models of the catalogue with size, licence and whether they are on this machine; or show one of them."""
    from fewstep.cli.inspect import table
    from fewstep.inspect.catalogue import details, table_row
    from fewstep.models.zoo import CATALOGUE, entry

    content: Any = [table_row(model) for model in CATALOGUE.values()] if name is None else details(entry(name))
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    elif name is None:
        _print_table(content)
    else:
        typer.echo(table(content))


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
