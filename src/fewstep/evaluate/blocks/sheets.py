"""Sheets of pictures with what was found in them, nothing picked by hand."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from fewstep.evaluate.blocks.composition import READERS, Answer
from fewstep.images import contact_sheet
from fewstep.metrics.pixels import Pictures

TILE, WORDS = 192, 44
PAIRS = 8
RIGHT, WRONG = "#2a9d4a", "#c0392b"


def exam_sheet(answer: Answer, pictures: Pictures, count: int, columns: int = 5) -> Image.Image:
    """The first `count` pictures of an answer with their prompts; the bar's left half is the algorithm's verdict,
    its right half the network's: green for right.
    """
    tiles = []
    for i in range(min(count, answer.count)):
        verdicts = [answer.grades[reader].images[i] for reader in READERS]
        tiles.append(_tile(pictures[i], answer.question.prompts[i], verdicts))
    return contact_sheet(tiles, columns)


def neighbours_sheet(drawn: Pictures, training: Pictures, index: Tensor, captions: Sequence[str]) -> Image.Image:
    """The first drawn pictures, and to the right of each its nearest training picture, of number `index` (N,)."""
    tiles = []
    for i in range(min(PAIRS, len(drawn))):
        tiles.append(_tile(drawn[i], f"drawn: {captions[i]}", []))
        tiles.append(_tile(training[int(index[i])], "nearest training picture", []))
    return contact_sheet(tiles, 4)


def _tile(picture: Image.Image, caption: str, verdicts: Sequence[bool]) -> Image.Image:
    """One picture enlarged, a bar for each verdict side by side, and its caption."""
    tile = Image.new("RGB", (TILE, TILE + WORDS), "white")
    tile.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(tile)
    for i, right in enumerate(verdicts):
        left = i * TILE // len(verdicts)
        draw.rectangle((left, TILE, left + TILE // len(verdicts) - 1, TILE + 3), fill=RIGHT if right else WRONG)
    lines = [""]
    for word in caption.split():
        if draw.textlength(f"{lines[-1]} {word}") > TILE - 8:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    draw.multiline_text((4, TILE + 7), "\n".join(lines[:2]), fill="black", spacing=3)
    return tile
