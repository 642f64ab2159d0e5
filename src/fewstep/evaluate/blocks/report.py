"""The report on block models: tables, and sheets to look at."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fewstep.blockworld import split_digest
from fewstep.cards.training_record import Score
from fewstep.charts import require_matplotlib
from fewstep.evaluate.blocks.chart import write_chart
from fewstep.evaluate.blocks.composition import READERS, versus
from fewstep.evaluate.blocks.suite import Extent, Judge, Measured
from fewstep.evaluate.candidates import Contestant
from fewstep.metrics.diversity import SEEDS
from fewstep.metrics.features import Features
from fewstep.metrics.intervals import format_interval
from fewstep.tables import Cell, Rows, csv_text, machine, save_picture, table, write_text

WIDE = 0.1
"""An interval of a share that is wider is said to be."""


def write_blocks(models: Sequence[Contestant], extent: Extent, features: Features, folder: Path) -> Path:
    """Examine `models`, the first being what the others are compared with; the path of the report.

    Writes `blocks.md`, `.csv`, `.svg` and `.png` into `folder`, and for each model two sheets and its card's scores.
    """
    require_matplotlib()
    judge = Judge(models[0].easel.pipe.parts.defaults.width, extent, features)
    found = [judge.measure(model) for model in models]
    for one in found:
        for what, sheet in one.sheets.items():
            save_picture(sheet, folder / sheet_name(one.contestant, what))
        scores = [asdict(score) for score in _scores(one, found[0])]
        write_text(folder / file_name(one.contestant, "scores.json"), json.dumps(scores, indent=1) + "\n")
    title = f"{extent.count} held-out prompts of either kind; FID by {features.card.name}"
    write_chart(found, title, [folder / "blocks.svg", folder / "blocks.png"])
    write_text(folder / "blocks.csv", csv_text(_marks(found)))
    write_text(folder / "blocks.md", _report(found, judge))
    return folder / "blocks.md"


def sheet_name(model: Contestant, what: str) -> str:
    """`blocks-turbo-4-steps-answers.png`."""
    return file_name(model, f"{what}.png")


def file_name(model: Contestant, what: str) -> str:
    """`blocks-turbo-4-steps-scores.json`."""
    return re.sub(r"[^\w.]+", "-", f"{model.label} {what}")


def _scores(one: Measured, base: Measured) -> list[Score]:
    """What a card says: what each reader finds right, and the diversity beside the base's."""
    drawn, scores = one.contestant.label, list[Score]()
    for answer in one.answers:
        for reader in READERS:
            value, low, high = answer.exact(reader)
            how, what = f"{drawn}; by the {reader}", f"drawn right, {answer.question.part}"
            scores.append(Score(what=what, value=value, how=how, low=low, high=high, count=answer.count))
    if one is not base:
        value, low, high = one.diversity.share_of(base.diversity)["variance"]
        how, what = f"{drawn}; variance of features", f"diversity, as a share of that of {base.contestant.label}"
        scores.append(Score(what=what, value=value, how=how, low=low, high=high, count=len(one.diversity.variance)))
    return scores


def _sheets(found: Sequence[Measured], what: str) -> list[str]:
    return [f"![{one.contestant.label}]({sheet_name(one.contestant, what)})" for one in found]


def _report(found: Sequence[Measured], judge: Judge) -> str:
    extent, network = judge.extent, judge.examiner.network.card
    where = f"pictures in {extent.trained_on}" if extent.trained_on else "fresh renders of training scenes"
    parts = [
        "# What block models draw",
        f"Canonical captions; the seed of picture i is i. Split {split_digest()}. Readers: the algorithm "
        f"(`BlockReader`) and the network {network}. Features: {judge.features.card}. {machine()}.",
        table([one.contestant.row(one.drawings) for one in found]),
        "## Prompts drawn right",
        "Count, colours, shapes on their colours, sizes that are said, relation, direction; Wilson's 95 % intervals. "
        "The last column is the mean of both readers as a share.",
        table(_summary(found)),
        *_doubts(found),
        "Under each picture the algorithm's verdict on the left, the network's on the right; green is right.",
        *_sheets(found, "answers"),
        "![the chart](blocks.svg)",
        "## Diversity, and likeness to renders",
        f"{extent.varied} held-out prompts with {SEEDS} seeds each: variance of the features, entropy in bits of place "
        "and of size. Wrong pictures raise all three. FID and KID: of the pictures with two objects, held out.",
        table([_diversity(one, found[0]) for one in found]),
        "## Nearest training pictures",
        f"Of pictures with two objects, held out, among {len(judge.training)} {where}. `distance`: "
        "the median of the features', as a share of that of fresh real pictures of held-out scenes; well under 1 would "
        "tell of memory.",
        table([_neighbours(one) for one in found]),
        *_sheets(found, "neighbours"),
        "## Mark by mark",
        "What the columns mean: `fewstep.blockworld.grading.Grades`.",
        table(_marks(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(found: Sequence[Measured]) -> Rows:
    base, rows = found[0], list[dict[str, Cell]]()
    for one in found:
        for answer, share in zip(one.answers, versus(one.answers, base.answers), strict=True):
            row: dict[str, Cell] = {"model": one.contestant.label, "prompts": answer.question.part, "n": answer.count}
            row |= {f"right, by the {reader}": format_interval(answer.exact(reader)) for reader in READERS}
            rows.append(
                row | {"readers agree": format_interval(answer.agreement), f"of {base.contestant.label}": share}
            )
    return rows


def _marks(found: Sequence[Measured]) -> Rows:
    return [row for one in found for answer in one.answers for row in answer.rows(one.contestant.label)]


def _doubts(found: Sequence[Measured]) -> list[str]:
    """What is known badly, in a sentence."""
    widths = dict[str, float]()
    for one in found:
        for answer in one.answers:
            _, low, high = answer.exact(READERS[0])
            part = f"{answer.question.part} (n = {answer.count})"
            widths[part] = max(high - low, widths.get(part, 0.0))
    said = [f"{part}: an interval {width:.2f} wide" for part, width in widths.items() if width > WIDE]
    return [f"Too few pictures to tell models well apart: {'; '.join(said)}. Take more with `--count`."] if said else []


def _diversity(one: Measured, base: Measured) -> dict[str, Cell]:
    row: dict[str, Cell] = {"model": one.contestant.label, **one.diversity.means()}
    shares = one.diversity.share_of(base.diversity)
    row |= {f"{name} of {base.contestant.label}": format_interval(share) for name, share in shares.items()}
    far = one.distances
    return row | (
        {"FID": format_interval(far.fid), "KID": format_interval(far.kid.interval)}
        if far
        else {"FID": None, "KID": None}
    )


def _neighbours(one: Measured) -> dict[str, Cell]:
    pixels = one.neighbours.pixels
    return {
        "model": one.contestant.label,
        "pictures": len(pixels),
        "copies": format_interval(one.neighbours.copies),
        "distance": one.closer,
        "least difference of pixels, of 255": float(pixels.min()),
        "its median": float(pixels.median()),
    }
