"""What is written about an evaluation: Markdown for people and CSV for programs, each whole or not at all."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from fewstep.files import atomic_write
from fewstep.images import save_png

Cell = str | int | float | None
Rows = Sequence[Mapping[str, Cell]]


def write_text(path: Path, text: str) -> None:
    """Write `text` to a file that appears, or is replaced, when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file that appears, or is replaced, when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(picture, path, {})


def csv_text(rows: Rows) -> str:
    """CSV with a head, of rows of the same names; numbers in full."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def table(rows: Rows) -> str:
    """A Markdown table of rows of the same names; numbers to three digits, nothing for None."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([format_number(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_number(value: Cell) -> str:
    """A number as people read it: three digits after the point below 10, fewer above; 1,000 in groups."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value


def machine() -> str:
    """What the pictures were drawn and judged on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}, PyTorch {torch.__version__.split('+')[0]}"
