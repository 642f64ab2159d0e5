"""How often an embedded model follows its prompt, by two readers: the report, and contact sheets for the docs.

    python -m benchmarks.blocks_exam [MODEL ...] [--count 1000] [--name exam] [--images docs/images]

Runs `fewstep evaluate blocks` (which see) on blocks-base and the models named, of which each that draws in a few steps
comes at 1 and 4, with the undistilled base at 1 and 4 beside it. Copies the report to `results`, and its chart
and the sheets of answers to `--images`: the first prompts of each model, nothing picked by hand. Images
that were drawn before are not drawn again.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import fewstep
from benchmarks.commit import add_commit_option, commit_line
from fewstep.evaluate.blocks.report import sheet_name, write_blocks
from fewstep.evaluate.blocks.suite import SampleSizes
from fewstep.evaluate.candidates import load_candidates
from fewstep.evaluate.image_cache import ImageCache
from fewstep.metrics.features import load_features
from fewstep.tables import write_text

RESULTS = Path(__file__).parent / "results"
SHEETS = ("answers", "neighbours")


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/blocks-exam"))
    parser.add_argument("--name", default="exam")
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    add_commit_option(parser)
    options = parser.parse_args()
    folder = options.folder / "pictures"
    models = load_candidates(
        options.models, "blocks-base", lambda name: ImageCache(name, fewstep.load(name, device="cpu"), folder)
    )
    report = write_blocks(models, SampleSizes(count=options.count), load_features(), options.folder)
    path = RESULTS / f"blocks_{options.name}_{datetime.date.today()}.md"
    text = report.read_text(encoding="utf-8")
    for image in (*(sheet_name(model, what) for model in models for what in SHEETS), "blocks.svg"):
        text = text.replace(f"]({image})", f"](../../{options.images}/{options.name}-{image})")
        if "neighbours" not in image:
            (options.images / f"{options.name}-{image}").write_bytes((options.folder / image).read_bytes())
    command = (
        f"python -m benchmarks.blocks_exam {' '.join(options.models)} --count {options.count} --name {options.name}"
    )
    write_text(path, f"{_without_neighbours(text)}\n{commit_line(options.commit)} Command: `{command}`.\n")
    print(path.read_text(encoding="utf-8"), path, sep="\n")


def _without_neighbours(text: str) -> str:
    """Their sheets stay in the working folder: they are large, and looked at once."""
    return "\n\n".join(part for part in text.split("\n\n") if not (part.startswith("![") and "neighbours" in part))


if __name__ == "__main__":
    main()
