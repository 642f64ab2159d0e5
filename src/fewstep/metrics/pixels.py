"""Images as the networks that judge take them: read from folders, of 8 bits, resized with antialiasing.

A judge that resizes without it gives other numbers on the same images (arXiv:2104.11222).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import InputError
from fewstep.files import file_size
from fewstep.images import FORMATS, UNREADABLE

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 64
CPU = torch.device("cpu")
BLACK = 2
"""The largest value, of 255, in an image that counts as black."""


class Images(Protocol):
    """Images in an order: a list, a tuple, or `ImageFiles`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def __iter__(self) -> Iterator[Image.Image]: ...


class ImageFiles:
    """The images in files, each opened when it is looked at, so that any number of them can be judged."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return open_image(self.paths[index])

    def __iter__(self) -> Iterator[Image.Image]:
        return map(open_image, self.paths)


def image_files(folder: Path) -> list[Path]:
    """The images in `folder` and the folders in it, in the order of their names; InputError for none."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one that holds images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not found:
        raise InputError(f"{folder} holds no image ({', '.join(ENDINGS)})")
    return found


def open_image(path: Path) -> Image.Image:
    """The image in a file, of 8 bits a colour; InputError for a file that cannot be read."""
    try:
        file_size(path)
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as a PNG, JPEG or WebP image: {error}; take it away") from error


def is_black(image: Image.Image) -> bool:
    """Whether nothing is to be seen, as where a decoder gave NaN."""
    return float(image_tensor(image).max()) <= BLACK


def image_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 from 0 to 255."""
    array = np.asarray(image.convert("RGB"), np.float32)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None]


def resized_tensor(image: Image.Image, side: int) -> Tensor:
    """(1, 3, side, side) float32 from 0 to 255, bicubic and antialiased; sides of another ratio are squeezed."""
    values = image_tensor(image)
    if tuple(values.shape[2:]) == (side, side):
        return values
    smooth: Tensor = F.interpolate(values, (side, side), mode="bicubic", antialias=True)
    return smooth.clamp(0, 255)


@torch.inference_mode()
def apply_in_batches(
    images: Images,
    ready: Callable[[Image.Image], Tensor],
    network: Callable[[Tensor], Tensor],
    device: torch.device = CPU,
) -> Tensor:
    """What `network`, which is on `device`, says of `ready` images: (N, D) float32 on the CPU; InputError for none."""
    if not len(images):
        raise InputError("there are no images to judge; give at least one")
    said = []
    for first in range(0, len(images), BATCH):
        batch = [ready(images[i]) for i in range(first, min(first + BATCH, len(images)))]
        said.append(network(torch.cat(batch).to(device)).float().cpu())
    return torch.cat(said)
