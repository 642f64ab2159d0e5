"""FID and KID of the images in one folder against those in another."""

from __future__ import annotations

from pathlib import Path

from fewstep.metrics.distances import distances
from fewstep.metrics.features import Features
from fewstep.metrics.intervals import format_interval
from fewstep.metrics.pixels import ImageFiles, image_files, is_black
from fewstep.tables import Cell, csv_text, table, write_text


def write_fid(generated: Path, real: Path, features: Features, folder: Path) -> Path:
    """Write `fid.md` and `fid.csv` on the images in `generated` against those in `real`; the path of the report.

    Raises InputError for fewer than 10 images, and for a file that is no image.
    """
    images, reference = (ImageFiles(image_files(own)) for own in (generated, real))
    result = distances(features.of(images), features.of(reference), str(features.network_id))
    row: dict[str, Cell] = {
        "pictures": len(images),
        "black": sum(map(is_black, images)),
        "reference": len(reference),
        "FID": result.fid.value,
        "fid_low": result.fid.low,
        "fid_high": result.fid.high,
        "FID of endless pictures": result.limit,
        "KID": result.kid.value,
        "kid_error": result.kid.standard_error,
    }
    text = [
        f"# FID of {generated.name} against {real.name}",
        f"FID {format_interval(result.fid)}, by {features.network_id}. "
        "Only numbers of one network and one N stand side by side.",
        table([row]),
        result.warning() or "",
    ]
    write_text(folder / "fid.csv", csv_text([row]))
    write_text(folder / "fid.md", "\n\n".join(filter(None, text)) + "\n")
    return folder / "fid.md"
