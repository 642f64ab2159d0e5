"""How often an embedded model draws what its prompt says, judged by two readers: the report and a sheet for the docs.

    python -m benchmarks.blocks_exam [MODEL ...] [--count 1000] [--sheet docs/images/blocks-base.png]

Runs `fewstep evaluate blocks` (which see) on blocks-base and the models named, of which each that draws in a few steps
comes at 1 and 4, with the undistilled base at 1 and 4 beside it. Copies the report to `results/blocks_exam_<date>.md`,
and the sheet of the last model named, or of blocks-base, to `--sheet`: its first prompts, nothing picked by hand.
Pictures that were drawn before are not drawn again.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import fewstep
from fewstep.evaluate.blocks_report import sheet_name, write_blocks
from fewstep.evaluate.blocks_suite import Extent
from fewstep.evaluate.contestants import contestants
from fewstep.evaluate.drawing import Easel
from fewstep.evaluate.features import load_features
from fewstep.evaluate.report import write_text

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Hold the exam and keep its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/blocks-exam"))
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    pictures = asked.folder / "pictures"
    models = contestants(
        asked.models, "blocks-base", lambda name: Easel(name, fewstep.load(name, device="cpu"), pictures)
    )
    report = write_blocks(models, Extent(count=asked.count), load_features(), asked.folder)
    path = RESULTS / f"blocks_exam_{datetime.date.today()}.md"
    command = f"Command: `python -m benchmarks.blocks_exam {' '.join(asked.models)} --count {asked.count}`.\n"
    write_text(path, f"{report.read_text(encoding='utf-8')}\n{command}")
    print(path.read_text(encoding="utf-8"), path, sep="\n")
    if asked.sheet:
        last = next(model for model in reversed(models) if not asked.models or model.easel.name in asked.models[-1])
        asked.sheet.write_bytes((asked.folder / sheet_name(last, "answers")).read_bytes())


if __name__ == "__main__":
    main()
