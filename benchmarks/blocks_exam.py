"""How often an embedded model draws what its prompt says, judged by the algorithmic reader.

    python -m benchmarks.blocks_exam [--model blocks-base] [--count 200] [--sheet docs/images/blocks-base.png]

Draws `count` prompts with one object and `count` with two and a relation, from captions never trained on, and a quarter
of that from other splits, through the public pipeline at the model's defaults; the seed of picture i is i. Writes
`results/blocks_exam_<model>_<date>.md` and a contact sheet of the first prompts, nothing picked by hand: a bar under a
picture says whether it was read as right.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image, ImageDraw

import fewstep
from fewstep.data.blockworld import captions, scenes, split_digest
from fewstep.evaluate.intervals import share_interval
from fewstep.evaluate.readers import BlockReader, Grades, grade
from fewstep.images import contact_sheet, to_tensor

RESULTS = Path(__file__).parent / "results"
BATCH = 25
EXAMS = {  # name: split, share of scenes with one object, prompts as a share of `count`
    "one object, held out": ("heldout", 1.0, 1.0),
    "two objects, held out": ("heldout", 0.0, 1.0),
    "one object, colour and shape never together": ("unseen_atoms", 1.0, 0.25),
    "two objects, colour and shape never together": ("unseen_atoms", 0.0, 0.25),
    "one object, trained on": ("train", 1.0, 0.25),
    "two objects, trained on": ("train", 0.0, 0.25),
}
COLUMNS = ("exact", "count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind", "direction")


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The pictures drawn for some prompts, and how they were read."""

    prompts: Sequence[str]
    pictures: Sequence[Image.Image]
    grades: Grades
    seconds: float


def examined(pipe: fewstep.Pipeline, split: str, single: float, count: int) -> Exam:
    """`count` canonical captions of `split`, drawn and read."""
    wanted = scenes(count, seed=2026, split=split, single=single)
    prompts = captions(wanted, seed=2026, style="canonical")
    pictures: list[Image.Image] = []
    started = perf_counter()
    for first in range(0, count, BATCH):
        part = prompts[first : first + BATCH]
        pictures += pipe.text_to_image(part, seed=range(first, first + len(part))).images
    seconds = perf_counter() - started
    readings = BlockReader(pictures[0].width).read(torch.cat([to_tensor(picture) for picture in pictures]))
    return Exam(prompts=prompts, pictures=pictures, grades=grade(readings, wanted, prompts), seconds=seconds)


def report(pipe: fewstep.Pipeline, exams: dict[str, Exam]) -> str:
    """The results as Markdown."""
    defaults, model = pipe.parts.defaults, pipe.parts
    networks = (model.unet, model.autoencoder, *model.text_encoders)
    parameters = sum(parameter.numel() for network in networks for parameter in network.parameters())
    head = ["prompts", "n", "exact, 95 % interval", *COLUMNS]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, exam in exams.items():
        count = len(exam.prompts)
        _, low, high = share_interval(exam.grades.exact, count)
        unasked = {"relation_kind", "direction"} if name.startswith("one") else {"size"}  # not in these prompts
        shares = ["" if column in unasked else f"{getattr(exam.grades, column):.3f}" for column in COLUMNS]
        rows.append(f"| {' | '.join([name, str(count), f'{low:.3f} to {high:.3f}', *shares])} |")
    rate = sum(len(exam.pictures) for exam in exams.values()) / sum(exam.seconds for exam in exams.values())
    return "\n".join(
        [
            f"# {model.name}: prompts drawn right, by the algorithmic reader",
            "",
            f"Canonical captions; the seed of picture i of a row is i. Split {split_digest()}.",
            f"{defaults.width}x{defaults.height} px, {defaults.steps} steps of {defaults.sampler} "
            f"({defaults.schedule}), guidance {defaults.guidance_scale:g}; {parameters:,} parameters.",
            "",
            *rows,
            "",
            f"Drawn at {rate:.1f} pictures/s in batches of {BATCH} on {platform.machine()}, {torch.get_num_threads()} "
            f"threads, PyTorch {torch.__version__.split('+')[0]}, fewstep {fewstep.__version__}; the machine was not "
            "kept free for this, so take the rate as a lower bound.",
            "",
            "Command: `python -m benchmarks.blocks_exam`. What the columns mean: `fewstep.evaluate.readers.Grades`.",
            "",
        ]
    )


def labelled(exam: Exam, index: int, side: int = 192) -> Image.Image:
    """One picture enlarged, its prompt under it, and a bar: green where it was read as right."""
    tile = Image.new("RGB", (side, side + 44), "white")
    tile.paste(exam.pictures[index].resize((side, side), Image.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, side, side, side + 3), fill="#2a9d4a" if exam.grades.images[index] else "#c0392b")
    words, lines = exam.prompts[index].split(), [""]
    for word in words:
        if draw.textlength(f"{lines[-1]} {word}") > side - 8:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    draw.multiline_text((4, side + 7), "\n".join(lines), fill="black", spacing=3)
    return tile


def main() -> None:
    """Hold the exam and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="blocks-base")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    pipe = fewstep.load(asked.model, device="cpu")
    exams = {
        name: examined(pipe, split, single, max(1, round(asked.count * share)))
        for name, (split, single, share) in EXAMS.items()
    }
    text = report(pipe, exams)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"blocks_exam_{pipe.parts.name}_{datetime.date.today()}.md"
    path.write_text(text, encoding="utf-8")
    print(text, path, sep="\n")
    if asked.sheet:
        two, one = exams["two objects, held out"], exams["one object, held out"]
        tiles = [labelled(two, i) for i in range(min(20, asked.count))]
        tiles += [labelled(one, i) for i in range(min(5, asked.count))]
        asked.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(tiles, 5).save(asked.sheet)


if __name__ == "__main__":
    main()
