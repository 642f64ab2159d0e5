"""Contact sheets: the first images of a model with their grades, and with their nearest training images."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from fewstep.evaluate.blocks.composition import READERS, Answer
from fewstep.images import contact_sheet
from fewstep.metrics.pixels import Images

TILE, WORDS = 192, 44
PAIRS = 8
RIGHT, WRONG = "#2a9d4a", "#c0392b"


def exam_sheet(answer: Answer, images: Images, count: int, columns: int = 5) -> Image.Image:
    """The first `count` images of an answer with their prompts.

    The bar's left half is the algorithm's verdict, its right half the network's: green for right.
    """
    tiles = []
    for i in range(min(count, answer.count)):
        verdicts = [answer.grades[reader].images[i] for reader in READERS]
        tiles.append(_tile(images[i], answer.question.prompts[i], verdicts))
    return contact_sheet(tiles, columns)


def neighbours_sheet(images: Images, training: Images, index: Tensor, captions: Sequence[str]) -> Image.Image:
    """The first generated images, each with its nearest training image, of number `index` (N,), to the right."""
    tiles = []
    for i in range(min(PAIRS, len(images))):
        tiles.append(_tile(images[i], f"drawn: {captions[i]}", []))
        tiles.append(_tile(training[int(index[i])], "nearest training image", []))
    return contact_sheet(tiles, 4)


def _tile(image: Image.Image, caption: str, verdicts: Sequence[bool]) -> Image.Image:
    """One image enlarged, a bar for each verdict side by side, and its caption."""
    tile = Image.new("RGB", (TILE, TILE + WORDS), "white")
    tile.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (0, 0))
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
