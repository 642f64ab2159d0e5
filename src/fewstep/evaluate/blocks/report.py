"""The report on block models: tables, a chart and contact sheets."""

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
from fewstep.evaluate.blocks.composition import READERS, relative_accuracy
from fewstep.evaluate.blocks.suite import BlockBenchmark, BlockResults, SampleSizes
from fewstep.evaluate.candidates import LoadedCandidate
from fewstep.evaluate.environment import machine
from fewstep.images import save_png
from fewstep.metrics.diversity import SEEDS
from fewstep.metrics.features import Features
from fewstep.metrics.intervals import format_interval
from fewstep.tables import Cell, Rows, csv_text, table, write_text

WIDE = 0.1
"""An interval of a share that is wider is said to be."""


def write_blocks(models: Sequence[LoadedCandidate], sizes: SampleSizes, features: Features, folder: Path) -> Path:
    """Measure `models`, of which the first is the baseline of the others, and write the report; its path.

    Writes `blocks.md`, `.csv`, `.svg` and `.png` into `folder`, and for each model two contact sheets and a JSON file
    of scores for its model card.
    """
    require_matplotlib()
    benchmark = BlockBenchmark(models[0].cache.pipe.spec.defaults.width, sizes, features)
    results = [benchmark.measure(model) for model in models]
    folder.mkdir(parents=True, exist_ok=True)
    for one in results:
        for what, sheet in one.sheets.items():
            save_png(sheet, folder / sheet_name(one.candidate, what), {})
        scores = [asdict(score) for score in _scores(one, results[0])]
        write_text(folder / file_name(one.candidate, "scores.json"), json.dumps(scores, indent=1) + "\n")
    title = f"{sizes.count} held-out prompts of either kind; FID by {features.network_id.name}"
    write_chart(results, title, [folder / "blocks.svg", folder / "blocks.png"])
    write_text(folder / "blocks.csv", csv_text(_marks(results)))
    write_text(folder / "blocks.md", _report(results, benchmark))
    return folder / "blocks.md"


def sheet_name(model: LoadedCandidate, what: str) -> str:
    """`blocks-turbo-4-steps-answers.png`."""
    return file_name(model, f"{what}.png")


def file_name(model: LoadedCandidate, what: str) -> str:
    """`blocks-turbo-4-steps-scores.json`."""
    return re.sub(r"[^\w.]+", "-", f"{model.label} {what}")


def _scores(one: BlockResults, base: BlockResults) -> list[Score]:
    """The scores of a model card: prompt following by each reader, and diversity relative to the baseline."""
    label, scores = one.candidate.label, list[Score]()
    for answer in one.answers:
        for reader in READERS:
            value, low, high = answer.exact(reader)
            how, what = f"{label}; by the {reader}", f"drawn right, {answer.question.group}"
            scores.append(Score(what=what, value=value, how=how, low=low, high=high, count=answer.count))
    if one is not base:
        value, low, high = one.diversity.relative_to(base.diversity)["variance"]
        how, what = f"{label}; variance of features", f"diversity, as a share of that of {base.candidate.label}"
        scores.append(Score(what=what, value=value, how=how, low=low, high=high, count=len(one.diversity.variance)))
    return scores


def _sheets(results: Sequence[BlockResults], what: str) -> list[str]:
    return [f"![{one.candidate.label}]({sheet_name(one.candidate, what)})" for one in results]


def _report(results: Sequence[BlockResults], benchmark: BlockBenchmark) -> str:
    sizes, network = benchmark.sizes, benchmark.examiner.network.network_id
    where = f"images in {sizes.trained_on}" if sizes.trained_on else "fresh renders of training scenes"
    parts = [
        "# What block models draw",
        f"Canonical captions; the seed of image i is i. Split {split_digest()}. Readers: the algorithm "
        f"(`BlockReader`) and the network {network}. Features: {benchmark.features.network_id}. {machine()}.",
        table([one.candidate.row(one.image_sets) for one in results]),
        "## Prompts drawn right",
        "Count, colours, shapes on their colours, sizes that are said, relation, direction; Wilson's 95 % intervals. "
        "The last column is the mean of both readers as a share.",
        table(_summary(results)),
        *_sample_size_warnings(results),
        "Under each image the algorithm's verdict on the left, the network's on the right; green is right.",
        *_sheets(results, "answers"),
        "![the chart](blocks.svg)",
        "## Diversity, and likeness to renders",
        f"{sizes.varied} held-out prompts with {SEEDS} seeds each: variance of the features, entropy in bits of place "
        "and of size. Wrong images raise all three. FID and KID: of the images with two objects, held out.",
        table([_diversity(one, results[0]) for one in results]),
        "## Nearest training images",
        f"Of images with two objects, held out, among {len(benchmark.training)} {where}. `distance`: "
        "the median of the features', as a share of that of fresh real images of held-out scenes; well under 1 would "
        "tell of memory.",
        table([_neighbours(one) for one in results]),
        *_sheets(results, "neighbours"),
        "## Mark by mark",
        "What the columns mean: `fewstep.blockworld.grading.Grades`.",
        table(_marks(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(results: Sequence[BlockResults]) -> Rows:
    base, rows = results[0], list[dict[str, Cell]]()
    for one in results:
        for answer, share in zip(one.answers, relative_accuracy(one.answers, base.answers), strict=True):
            row: dict[str, Cell] = {"model": one.candidate.label, "prompts": answer.question.group, "n": answer.count}
            row |= {f"right, by the {reader}": format_interval(answer.exact(reader)) for reader in READERS}
            rows.append(row | {"readers agree": format_interval(answer.agreement), f"of {base.candidate.label}": share})
    return rows


def _marks(results: Sequence[BlockResults]) -> Rows:
    return [row for one in results for answer in one.answers for row in answer.rows(one.candidate.label)]


def _sample_size_warnings(results: Sequence[BlockResults]) -> list[str]:
    """A sentence on the intervals that are too wide; none where all are narrow."""
    widths = dict[str, float]()
    for one in results:
        for answer in one.answers:
            _, low, high = answer.exact(READERS[0])
            part = f"{answer.question.group} (n = {answer.count})"
            widths[part] = max(high - low, widths.get(part, 0.0))
    wide = [f"{part}: an interval {width:.2f} wide" for part, width in widths.items() if width > WIDE]
    return [f"Too few images to tell models well apart: {'; '.join(wide)}. Take more with `--count`."] if wide else []


def _diversity(one: BlockResults, base: BlockResults) -> dict[str, Cell]:
    row: dict[str, Cell] = {"model": one.candidate.label, **one.diversity.averages()}
    shares = one.diversity.relative_to(base.diversity)
    row |= {f"{name} of {base.candidate.label}": format_interval(share) for name, share in shares.items()}
    far = one.distances
    return row | (
        {"FID": format_interval(far.fid), "KID": format_interval(far.kid.interval)}
        if far
        else {"FID": None, "KID": None}
    )


def _neighbours(one: BlockResults) -> dict[str, Cell]:
    pixels = one.neighbours.pixels
    return {
        "model": one.candidate.label,
        "pictures": len(pixels),
        "copies": format_interval(one.neighbours.copies),
        "distance": one.relative_distance,
        "least difference of pixels, of 255": float(pixels.min()),
        "its median": float(pixels.median()),
    }
