"""Charts by matplotlib, in files that are whole or not there; equal charts give equal files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.errors import MissingExtraError
from fewstep.files import partial_path

CHART_STYLE: dict[Any, Any] = {"svg.hashsalt": "fewstep", "font.size": 10}
"""With the salt the same points give the same file."""


def require_matplotlib() -> Any:
    """The package; MissingExtraError without it, better before the pictures are drawn than after."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError('charts need matplotlib: pip install "fewstep[train]"') from error
    return matplotlib


def save_figure(figure: Any, path: Path) -> None:
    """Write a chart that appears, or is replaced, when all of it is on the disk; equal charts give equal files."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with partial_path(path) as partial:
        figure.savefig(partial, format=path.suffix[1:] or None, dpi=150, metadata=metadata)
