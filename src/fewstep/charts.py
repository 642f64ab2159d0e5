"""Charts by matplotlib, written whole or not at all; equal charts give equal files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.errors import MissingExtraError
from fewstep.files import partial_path

CHART_STYLE: dict[Any, Any] = {"svg.hashsalt": "fewstep", "font.size": 10}
"""With the salt the same points give the same file."""


def require_matplotlib() -> Any:
    """The package; MissingExtraError without it, to be raised before images are generated."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError('charts need matplotlib: pip install "fewstep[train]"') from error
    return matplotlib


def save_figure(figure: Any, path: Path, *, dpi: int = 150) -> None:
    """Write a chart that appears, or is replaced, when all of it is on the disk; equal charts give equal files.

    The format is that of the path's ending, .svg or .png.
    """
    kind = path.suffix.removeprefix(".")
    with partial_path(path) as partial:
        figure.savefig(partial, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
