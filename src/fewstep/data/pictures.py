"""One picture on its way into a shard: read, judged by its looks, cut to a bucket, and stored again."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from math import cos, pi
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fewstep.data.buckets import Size
from fewstep.data.filters import Reason

Encoding = Literal["jpeg", "png"]
ENCODINGS: tuple[Encoding, ...] = ("jpeg", "png")
FORMATS = ("JPEG", "PNG", "WEBP")
LARGEST_PICTURE = 64_000_000  # pixels
LARGEST_EMPTY = 8_000_000  # pixels of a picture whose file may be as small as it can
MOST_SHRUNK = 200  # pixels for each byte of the file; a grey wall has 85 as a JPEG
MOST_SCANS = 100  # of a progressive JPEG; programs write 10, and each goes over all pixels anew
JPEG_QUALITY = 95

HASH_BITS = 128
_SIDE = 32  # of the small copy that is hashed
_SCALE = 1024  # of the integer cosines
_COLOURED = _SCALE**2 * _SIDE**2 // 2  # half a level of 255 in a chroma coefficient


class PictureError(Exception):
    """A picture that is left out, for the `reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def decoded(data: bytes) -> Image.Image:
    """The JPEG, PNG or WebP file `data` as an RGB picture of 8 bits: upright, transparency on white.

    Raises `PictureError` for a file of another kind, a damaged one, and one of over 64 million pixels, or over 8
    million with more than 200 for each byte of the file, whose pixels are not read.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            _require_size(opened.width * opened.height, len(data))
            if opened.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MOST_SCANS:
                raise PictureError(Reason.DAMAGED_PICTURE)
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened))
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(Reason.TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise PictureError(Reason.NOT_A_PICTURE) from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise PictureError(Reason.DAMAGED_PICTURE) from error


def _require_size(pixels: int, size: int) -> None:
    """Refuse a picture of too many pixels, also for its file, before they are decoded."""
    if pixels < 1:
        raise PictureError(Reason.DAMAGED_PICTURE)
    if pixels > LARGEST_PICTURE or pixels > max(LARGEST_EMPTY, MOST_SHRUNK * size):
        raise PictureError(Reason.TOO_LARGE)


def fitted(picture: Image.Image, size: Size) -> tuple[Image.Image, tuple[int, int]]:
    """`picture` made to cover `size` by Lanczos and cut to it in the middle, and where the cut begins.

    The second is (top, left) in the resized picture: the crop that SDXL is told. `PictureError` for one so narrow that
    it would have over 64 million pixels then.
    """
    scale = max(size.width / picture.width, size.height / picture.height)
    width, height = max(size.width, round(picture.width * scale)), max(size.height, round(picture.height * scale))
    _require_size(width * height, width * height)
    left, top = (width - size.width) // 2, (height - size.height) // 2
    resized = picture.resize((width, height), Image.Resampling.LANCZOS) if picture.size != (width, height) else picture
    return resized.crop((left, top, left + size.width, top + size.height)), (top, left)


def perceptual_hash(picture: Image.Image) -> int:
    """128 bits that hardly change when a picture is resized or compressed again.

    63 say which low frequencies of the brightness are over their median, 64 which of the two colour differences
    are clearly positive or negative. All in integers, so that every machine finds the same.
    """
    small = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX).convert("YCbCr")
    y, *chroma = np.moveaxis(np.asarray(small, np.int64), -1, 0)
    light = _frequencies(y, 8)[1:]
    colours = [_frequencies(plane - 128, 4) for plane in chroma]
    bits = [light > np.median(light), *(side * plane > _COLOURED for plane in colours for side in (1, -1))]
    return int.from_bytes(np.packbits(np.concatenate(bits)).tobytes(), "big")


def encoded(picture: Image.Image, encoding: Encoding) -> bytes:
    """The file of an RGB picture: PNG, or JPEG of quality 95 with whole colours."""
    file = BytesIO()
    if encoding == "jpeg":
        picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        picture.save(file, "PNG")
    return file.getvalue()


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits, at which Pillow would clip at 255
        return Image.fromarray((np.asarray(picture, np.int64).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


@cache
def _cosines(count: int) -> NDArray[np.int64]:
    """(count, 32): the first rows of the cosine transform, in integers."""
    rows = [[round(_SCALE * cos(pi * u * (2 * x + 1) / (2 * _SIDE))) for x in range(_SIDE)] for u in range(count)]
    return np.array(rows, np.int64)


def _frequencies(plane: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The count^2 lowest frequencies of a (32, 32) plane."""
    cosines = _cosines(count)
    return (cosines @ plane @ cosines.T).ravel()
