"""How often an embedded model draws what its prompt says, judged by two readers: the report and a sheet for the docs.

    python -m benchmarks.blocks_exam [MODEL ...] [--count 1000] [--name exam] [--images docs/images]

Runs `fewstep evaluate blocks` (which see) on blocks-base and the models named, of which each that draws in a few steps
comes at 1 and 4, with the undistilled base at 1 and 4 beside it. Copies the report to `results`, and its chart
and the sheets of answers to `--images`: the first prompts of each model, nothing picked by hand. Pictures
that were drawn before are not drawn again.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import fewstep
from fewstep.evaluate.blocks.report import sheet_name, write_blocks
from fewstep.evaluate.blocks.suite import SampleSizes
from fewstep.evaluate.candidates import load_candidates
from fewstep.evaluate.image_cache import ImageCache
from fewstep.metrics.features import load_features
from fewstep.tables import write_text

RESULTS = Path(__file__).parent / "results"
SHEETS = ("answers", "neighbours")


def main() -> None:
    """Hold the exam and keep its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/blocks-exam"))
    parser.add_argument("--name", default="exam")
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    asked = parser.parse_args()
    pictures = asked.folder / "pictures"
    models = load_candidates(
        asked.models, "blocks-base", lambda name: ImageCache(name, fewstep.load(name, device="cpu"), pictures)
    )
    report = write_blocks(models, SampleSizes(count=asked.count), load_features(), asked.folder)
    path = RESULTS / f"blocks_{asked.name}_{datetime.date.today()}.md"
    text = report.read_text(encoding="utf-8")
    for picture in (*(sheet_name(model, what) for model in models for what in SHEETS), "blocks.svg"):
        text = text.replace(f"]({picture})", f"](../../{asked.images}/{asked.name}-{picture})")
        if "neighbours" not in picture:
            (asked.images / f"{asked.name}-{picture}").write_bytes((asked.folder / picture).read_bytes())
    command = f"python -m benchmarks.blocks_exam {' '.join(asked.models)} --count {asked.count} --name {asked.name}"
    write_text(path, f"{_without_neighbours(text)}\nCommand: `{command}`.\n")
    print(path.read_text(encoding="utf-8"), path, sep="\n")


def _without_neighbours(text: str) -> str:
    """Their sheets stay in the working folder: they are large, and looked at once."""
    return "\n\n".join(part for part in text.split("\n\n") if not (part.startswith("![") and "neighbours" in part))


if __name__ == "__main__":
    main()
