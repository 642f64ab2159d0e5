"""Images as input of evaluation networks: read from folders, 8 bits, resized with antialiasing.

Without antialiasing the same images give other metrics (arXiv:2104.11222).
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
    """The images in files, each opened when it is accessed, so that any number of them fits into memory."""

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
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(ENDINGS)})")
    return files


def open_image(path: Path) -> Image.Image:
    """The image in a file, of 8 bits a colour; InputError for a file that cannot be read."""
    try:
        file_size(path)
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as a PNG, JPEG or WebP image: {error}; take it away") from error


def is_black(image: Image.Image) -> bool:
    """Whether an image is black, as where a decoder gave NaN."""
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
    preprocess: Callable[[Image.Image], Tensor],
    network: Callable[[Tensor], Tensor],
    device: torch.device = CPU,
) -> Tensor:
    """The outputs (N, D) float32 of `network` on `device` for preprocessed images, on the CPU; InputError for none."""
    if not len(images):
        raise InputError("there are no images; give at least one")
    outputs = []
    for first in range(0, len(images), BATCH):
        batch = [preprocess(images[i]) for i in range(first, min(first + BATCH, len(images)))]
        outputs.append(network(torch.cat(batch).to(device)).float().cpu())
    return torch.cat(outputs)
