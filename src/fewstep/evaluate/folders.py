"""How far the pictures in one folder are from those in another."""

from __future__ import annotations

from pathlib import Path

from fewstep.metrics.distances import distances
from fewstep.metrics.features import Features
from fewstep.metrics.intervals import format_interval
from fewstep.metrics.pixels import PictureFiles, is_black, picture_files
from fewstep.tables import Cell, csv_text, table, write_text


def write_fid(drawn: Path, real: Path, features: Features, folder: Path) -> Path:
    """Write `fid.md` and `fid.csv` on the pictures in `drawn` against those in `real`; the path of the report.

    Raises InputError for fewer than 10 pictures, and for a file that is no picture.
    """
    mine, theirs = (PictureFiles(picture_files(own)) for own in (drawn, real))
    found = distances(features.of(mine), features.of(theirs), str(features.card))
    row: dict[str, Cell] = {
        "pictures": len(mine),
        "black": sum(map(is_black, mine)),
        "reference": len(theirs),
        "FID": found.fid.value,
        "fid_low": found.fid.low,
        "fid_high": found.fid.high,
        "FID of endless pictures": found.limit,
        "KID": found.kid.value,
        "kid_error": found.kid.standard_error,
    }
    text = [
        f"# FID of {drawn.name} against {real.name}",
        f"FID {format_interval(found.fid)}, by {features.card}. "
        "Only numbers of one network and one N stand side by side.",
        table([row]),
        found.doubt() or "",
    ]
    write_text(folder / "fid.csv", csv_text([row]))
    write_text(folder / "fid.md", "\n\n".join(filter(None, text)) + "\n")
    return folder / "fid.md"
