"""`fewstep inspect`: what an image was generated with, and what a checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from fewstep.errors import InputError, printable, quoted

LONGEST = 400  # letters of one value, for people


def inspect(
    what: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="An image, a file or folder of weights, a name.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what an image was generated with, or what a checkpoint or a model is; loads no weights, fetches nothing."""
    from fewstep.inspect.describe import describe

    try:
        content = describe(what)
        text = json.dumps(content, indent=2) if as_json else table(content)
    except RecursionError as error:
        raise InputError(f"{quoted(what)} holds values in values that are nested too deeply to be shown") from error
    typer.echo(text)


def table(content: Mapping[str, Any]) -> str:
    """Two columns, names and values; nested entries are indented, and unknown values are left out."""
    rows = list(_rows(content))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:{width}}{text}".rstrip() for label, text in rows)


def _rows(content: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        label = f"{indent}{_text(name)[:40].replace('_', ' ')}"
        if isinstance(value, Mapping) and isinstance(value.get("parameters"), int) and "dtypes" in value:
            yield label, f"{value['parameters']:,} parameters, {_text(value['dtypes'])}"
        elif isinstance(value, Mapping) and len(indent) < 4:
            yield label, "" if value else "none"
            yield from _rows(value, indent + "  ")
        elif value is not None:
            yield label, _text(value)


def _text(value: Any) -> str:
    """`value` for people: on one line, cut in the middle when long, and nothing in it that a terminal would act on."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    plain = isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value)
    text = ", ".join(map(str, value)) if plain else str(value)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]} ({len(text):,} letters; --json has them all)"
    return printable(text).replace("\n", "\\n")
