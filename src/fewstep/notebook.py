"""How results and pipelines show themselves in a notebook."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from math import ceil, sqrt

from PIL.Image import Image

from fewstep.images import contact_sheet


def png_of(pictures: Sequence[Image]) -> bytes:
    """The PNG file of a picture, or of several in a grid."""
    sheet = pictures[0] if len(pictures) == 1 else contact_sheet(pictures, ceil(sqrt(len(pictures))))
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def html_of(pictures: Sequence[Image], caption: str) -> str:
    """The pictures as one image, with what is said of them below."""
    data = b64encode(png_of(pictures)).decode("ascii")
    return f'<figure><img src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'


def table_of(rows: Mapping[str, object]) -> str:
    """A table of names and values."""
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"
