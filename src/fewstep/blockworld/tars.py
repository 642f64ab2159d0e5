"""Blockworld as a collection from the web: tar files with captions, scores under odd names, and real flaws.

The scores go with what is wrong with a picture, so that the road from a collection to shards can be walked on real
files: a watermark is written over the picture, a low aesthetic score is a blur, an unsafe one a black bar.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fewstep.blockworld.captions import captions
from fewstep.blockworld.render import render
from fewstep.blockworld.scenes import scenes
from fewstep.blockworld.split import require_train
from fewstep.errors import InputError
from fewstep.files import atomic_write
from fewstep.formats.tar_writer import TarWriter

FATES: dict[str, float] = {
    "good": 0.70,
    "watermark": 0.08,
    "blurred": 0.06,
    "small": 0.05,
    "unsafe": 0.03,
    "copy": 0.03,
    "again": 0.02,
    "unscored": 0.02,
    "torn": 0.01,
}
"""What becomes of a picture, and how often. `copy` is the one before once more, `again` the same compressed
anew, with the same words; `torn` is a file that ends half way."""

LAION = {"aesthetic": "AESTHETIC_SCORE", "width": "WIDTH", "height": "HEIGHT", "caption": "TEXT", "url": "URL"}
"""The names that every second tar uses; the others use lower case. `pwatermark` and `punsafe` are the same in both."""


def write_blockworld(
    folder: str | Path, count: int, *, size: int = 128, seed: int = 0, per_tar: int = 1000
) -> list[Path]:
    """Write `count` flawed pictures of training scenes, `size` pixels wide, into tar files in `folder`; their paths.

    Equal arguments write equal bytes. Tars that are there already stay, so a run that was interrupted goes on.
    """
    if count < 1 or per_tar < 1 or not 16 <= size <= 1024:
        raise InputError(f"{count} pictures, {per_tar} in a tar, {size} wide: 1 or more, and 16 to 1024 pixels")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"blockworld-{number:05d}.tar" for number in range(-(-count // per_tar))]
    for number, path in enumerate(paths):
        if not path.exists():
            _write_tar(path, min(per_tar, count - number * per_tar), size, seed * 100_003 + number)
    return paths


def _write_tar(path: Path, count: int, size: int, seed: int) -> None:
    names: Mapping[str, str] = LAION if seed % 2 == 0 else {}
    with atomic_write(path) as file:
        tar = TarWriter(file)
        for i, item in enumerate(_items(count, size, seed)):
            tar.add(f"{i:09d}.{item.kind}", item.data)
            tar.add(f"{i:09d}.txt", item.columns["caption"].encode())
            tar.add(f"{i:09d}.json", json.dumps({names.get(k, k): v for k, v in item.columns.items()}).encode())
        tar.end()


class _Item(NamedTuple):
    picture: Image.Image
    kind: str
    data: bytes
    columns: dict[str, Any]


def _items(count: int, size: int, seed: int) -> Iterator[_Item]:
    """Pictures and their metadata; a copy, and a picture compressed again, have the metadata of the one before."""
    drawn = scenes(count, seed=seed)
    require_train(drawn)
    pixels = ((render(drawn, size) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    chance, item = random.Random(seed), None
    for i, caption in enumerate(captions(drawn, seed=seed, style="varied")):
        fate = chance.choices(list(FATES), list(FATES.values()))[0]
        if item is None or fate not in ("copy", "again"):
            picture = _flawed(Image.fromarray(pixels[i]), fate)
            columns = _columns(picture, fate, chance) | {"caption": caption, "url": f"blockworld:{seed}/{i}"}
            item = _Item(picture, *_file(picture, fate, i), columns)
        elif fate == "again":
            item = item._replace(kind="jpg", data=_file(item.picture, fate, i)[1])
        yield item


def _flawed(picture: Image.Image, fate: str) -> Image.Image:
    """`picture`, marked, blurred, barred or shrunk."""
    size = picture.width
    if fate == "watermark":
        font = ImageFont.load_default(size=max(8, size // 6))
        ImageDraw.Draw(picture, "RGBA").text((size / 2, size / 2), "SAMPLE", (255, 255, 255, 170), font, anchor="mm")
    elif fate == "unsafe":
        ImageDraw.Draw(picture).rectangle((0, size * 0.4, size, size * 0.6), "black")
    elif fate == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(size / 32))
    elif fate == "small":
        return picture.resize((size // 3, size // 3), Image.Resampling.LANCZOS)
    return picture


def _file(picture: Image.Image, fate: str, number: int) -> tuple[str, bytes]:
    """The ending and the contents of a picture's file; every fifth is a PNG, every seventh a WebP."""
    file = BytesIO()
    if fate == "again" or (number % 5 and number % 7):
        kind = "jpg"
        picture.save(file, "JPEG", quality=75 if fate == "again" else 95)
    else:
        kind = "webp" if number % 5 else "png"
        picture.save(file, kind, lossless=True)
    data = file.getvalue()
    return kind, data[: len(data) // 2] if fate == "torn" else data


def _columns(picture: Image.Image, fate: str, chance: random.Random) -> dict[str, Any]:
    """What a collection would say: sizes, and scores that go with the flaw."""
    size = {"width": picture.width, "height": picture.height}
    if fate == "unscored":
        return size | {"aesthetic": float("nan"), "pwatermark": None}

    def between(low: float, high: float) -> float:
        return round(chance.uniform(low, high), 4)

    return size | {
        "aesthetic": between(3.0, 4.9) if fate == "blurred" else between(5.2, 7.4),
        "pwatermark": between(0.6, 1.0) if fate == "watermark" else between(0.0, 0.3),
        "punsafe": between(0.7, 1.0) if fate == "unsafe" else between(0.0, 0.2),
        "similarity": between(0.25, 0.40),
    }
