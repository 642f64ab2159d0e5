"""Pictures: from files and arrays to tensors and back, and PNG files that say how they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import InputError, NotFiniteError, printable, quoted
from fewstep.files import file_size, partial_path
from fewstep.memory import is_short_of_memory, shortage

Picture = Image.Image | NDArray[Any] | Tensor | str | Path

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST_PICTURE = 64_000_000  # pixels
MOST_SCANS = 100  # of a progressive JPEG; programs write 10, and each goes over all pixels anew
LARGEST_METADATA = 65_536  # characters
LARGEST_EXIF = 30_000  # characters of EXIF data, whose 64 kB hold another text too
_DESCRIPTION, _MARK = ExifTags.Base.ImageDescription, "fewstep: "
LARGEST_FILE = 400_000_000  # bytes; that many pixels of 16 bits take less, not packed at all
UNREADABLE = Exception  # Pillow's parsers raise dozens of kinds
PARAMETERS = {  # of AUTOMATIC1111's text: our name, its name, what a value looks like, our type
    "steps": ("Steps", r"\d{1,9}", int),
    "sampler": ("Sampler", r"[^,]+", str),
    "guidance_scale": ("CFG scale", r"\d{1,9}(?:\.\d{1,9})?", float),
    "seed": ("Seed", r"\d{1,19}", int),
    "size": ("Size", r"\d{1,9}x\d{1,9}", str),
    "model": ("Model", r"[^,]+", str),
}


def to_tensor(image: Picture, width: int | None = None, height: int | None = None) -> Tensor:
    """`image` as float32 (1, 3, H, W) in [-1, 1], H and W rounded down to multiples of 8.

    Takes a PIL image or the path of a PNG, JPEG or WebP file (turned as its EXIF data say, transparency on
    white), an array (H, W, 3), or (B, H, W, 3), of uint8 or of floats in 0..1, or a tensor (3, H, W) or (B, 3, H, W)
    that is in [-1, 1] already. Keeps its size where `width` or `height` is None. PIL images are resized by Lanczos
    and equal those of diffusers' VaeImageProcessor. Raises `InputError`.
    """
    if isinstance(image, Tensor):
        return _resized(_checked(image, channels=3, lowest=-1.0), width, height)
    if isinstance(image, np.ndarray) and image.ndim == 4 and len(image):
        return torch.cat([to_tensor(each, width, height) for each in image])
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        planes = _checked(np.moveaxis(image, -1, 0).copy(), channels=3, lowest=0.0)
        return _resized(planes * 2 - 1, width, height)
    picture = _on_white(_opened(image))
    return _from_pil(picture.resize(_size(picture.size, width, height), Image.Resampling.LANCZOS)) * 2 - 1


def mask_to_tensor(mask: Picture, width: int, height: int) -> Tensor:
    """`mask` as float32 (1, 1, H, W) of 0 (keep) and 1 (repaint): white is 1, split at half brightness.

    Takes a PIL image or a path (transparency does not count), or an array or tensor (H, W): uint8, bool, or
    floats in 0..1. Where no number is above 1, 1 is white. Equal to diffusers' mask processor for other PIL images.
    Raises `InputError`, also for a mask that is white nowhere.
    """
    if isinstance(mask, np.ndarray) and mask.shape[2:] == (1,):
        mask = mask[:, :, 0]
    if isinstance(mask, Tensor) or (isinstance(mask, np.ndarray) and mask.dtype != np.uint8):
        grey = _resized(_checked(mask, channels=1, lowest=0.0), width, height)
    else:
        picture = _opened(mask)
        if picture.mode in ("L", "RGB") and np.max(picture.getextrema()) == 1:
            picture = picture.point(lambda value: 255 * value)
        picture = picture.resize(_size(picture.size, width, height), Image.Resampling.LANCZOS)
        grey = _from_pil(_converted(picture, "L"))
    if not bool((grey >= 0.5).any()):
        raise InputError("the mask is white nowhere, so nothing would be redrawn; white (1, 255 or True) is redrawn")
    return (grey >= 0.5).float()


def picture_size(image: object) -> tuple[int, int] | None:
    """Width and height in pixels of a picture, an array or the file at a path; None for what is none of them."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, np.ndarray | Tensor) and image.ndim in (2, 3, 4):
        rows = image.shape[-2:] if isinstance(image, Tensor) else image.shape[image.ndim == 4 :]
        return int(rows[1]), int(rows[0])
    if isinstance(image, str | Path):
        return _opened(image).size
    return None


def to_numpy(images: Tensor) -> NDArray[np.float32]:
    """(B, 3, H, W) in [-1, 1] as float32 (B, H, W, 3), clamped to 0..1. Raises `NotFiniteError`."""
    if not torch.isfinite(images).all():
        raise NotFiniteError("the picture holds NaN or infinity")
    unit = (images.detach() * 0.5 + 0.5).clamp(0, 1)
    array: NDArray[np.float32] = unit.permute(0, 2, 3, 1).float().cpu().numpy()
    return array


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3) on the same device, rounded as diffusers does; finite or not."""
    unit = (images.detach() * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] as B pictures of 8 bits. Raises `NotFiniteError`."""
    if not torch.isfinite(images).all():
        raise NotFiniteError("the picture holds NaN or infinity")
    return pil_of_uint8(to_uint8(images))


def pil_of_uint8(pictures: Tensor) -> list[Image.Image]:
    """uint8 (B, H, W, 3) as B pictures."""
    return [Image.fromarray(array) for array in pictures.cpu().numpy()]


def save_picture(image: Image.Image, path: str | Path, metadata: Mapping[str, object]) -> None:
    """Write `image` with `metadata`, as PNG, JPEG or WebP by the ending of `path`, or nothing at all when interrupted.

    See `save_png`; JPEG and WebP carry the same two texts in their EXIF data. Raises `InputError`.
    """
    path = Path(path)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{quoted(path.name)}: pictures are written as .png, .jpg, .jpeg or .webp")
    if kind == "PNG":
        return save_png(image, path, metadata)
    exif = Image.Exif()
    exif[_DESCRIPTION] = _MARK + _notes(metadata, ascii_only=True)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + _parameters(metadata).encode(
        "utf-16-be"
    )
    return _write(image, path, format=kind, exif=exif, quality=95)


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, object]) -> None:
    """Write `image` with `metadata` as JSON in the text chunk `fewstep`, or nothing at all when interrupted.

    The chunk `parameters` says the same in AUTOMATIC1111's words, for other programs. Raises `InputError` for
    a missing folder or more than 65,536 characters of metadata.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("fewstep", _notes(metadata))
    chunks.add_text("parameters", _parameters(metadata))
    _write(image, Path(path), format="PNG", pnginfo=chunks)


def _notes(metadata: Mapping[str, object], *, ascii_only: bool = False) -> str:
    text = json.dumps(dict(metadata), ensure_ascii=ascii_only)
    if len(text) > (LARGEST_EXIF if ascii_only else LARGEST_METADATA):
        raise InputError(f"{len(text)} characters of metadata are too many; the limit is {LARGEST_METADATA} (PNG)")
    return text


def _write(image: Image.Image, path: Path, **options: Any) -> None:
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to save {path.name} in; make it first")
    with partial_path(path) as partial:
        image.save(partial, **options)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_picture` wrote into the file at `path`, or what AUTOMATIC1111 did; None where neither is there.

    Of a foreign file it holds `prompt`, `negative_prompt` and what is found of `steps`, `sampler` (by its
    foreign name), `guidance_scale`, `seed`, `width`, `height`, `model`. Raises `InputError`.
    """
    with _readable(path), _regular(path), Image.open(path, formats=FORMATS) as image:
        own = "fewstep" in image.info
        text = image.info.get("fewstep" if own else "parameters")
        if image.format != "PNG":
            own, text = _from_exif(image)
        if not isinstance(text, str):
            return None
        if len(text) > LARGEST_METADATA:
            raise InputError(f"{len(text)} characters of metadata in {path}: over {LARGEST_METADATA}")
        found = json.loads(text) if own else _foreign(text)
        if not isinstance(found, dict):
            raise InputError(f"the metadata of {path} are not a JSON object: {text[:40]!r}")
        return found


def is_whole(path: str | Path) -> bool:
    """Whether a picture's file is as it was written: not cut short, and for PNG the checksums of its chunks agree."""
    try:
        with _regular(path), Image.open(path, formats=FORMATS) as image:
            image.verify()
    except UNREADABLE:
        return False
    return True


def _from_exif(image: Image.Image) -> tuple[bool, str | None]:
    """Whether fewstep wrote the picture, and the text about it in its EXIF data, if any."""
    exif = image.getexif()
    described, comment = exif.get(_DESCRIPTION), exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(described, str) and described.startswith(_MARK):
        return True, described.removeprefix(_MARK)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return False, comment[8 : 8 + 2 * LARGEST_METADATA].decode("utf-16-be", "replace")
    return False, None


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """`images` in rows of `columns` on white, each in a cell as large as the largest of them."""
    if not images or columns < 1:
        raise InputError(f"a contact sheet needs a picture and a column, not {len(images)} and {columns}")
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(images)), height * rows), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


@contextmanager
def _regular(path: str | Path) -> Iterator[None]:
    file_size(Path(path))
    yield


@contextmanager
def _readable(source: object) -> Iterator[None]:
    name = source if isinstance(source, str | Path) else type(source).__name__
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        text = shortage(error) if is_short_of_memory(error) else getattr(error, "strerror", None) or str(error)
        reason = quoted(text or type(error).__name__, 200)[1:-1]
        raise InputError(f"{printable(str(name))} cannot be read as a PNG, JPEG or WebP picture: {reason}") from error


def _opened(image: Image.Image | NDArray[np.uint8] | str | Path) -> Image.Image:
    with _readable(image):
        if isinstance(image, np.ndarray):
            return Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
        if isinstance(image, Image.Image):
            return _decoded(image)
        if not isinstance(image, str | Path):
            raise InputError(f"{type(image).__name__} is not a picture, an array, a tensor or a path")
        if (size := file_size(Path(image))) > LARGEST_FILE:
            raise InputError(f"{printable(str(image))} has {size:,} bytes; a picture has {LARGEST_FILE:,} at most")
        with Image.open(image, formats=FORMATS) as opened:
            if opened.format in ("JPEG", "MPO") and Path(image).read_bytes().count(b"\xff\xda") > MOST_SCANS:
                raise InputError(f"{printable(str(image))} goes over its pixels more than {MOST_SCANS} times")
            return _decoded(opened)


def _decoded(image: Image.Image) -> Image.Image:
    """A copy, upright and of 8 bits; its pixels are read only when there are not too many."""
    if image.width * image.height > LARGEST_PICTURE:
        raise InputError(f"{image.width} x {image.height} pixels are over the limit of {LARGEST_PICTURE:,}")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):  # Pillow would clip at 255
        return _of_8_bits(upright)
    return upright


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, of whole numbers up to 255 or 65535, or of floats up to 1 or 255; InputError for others."""
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    wide = 65535 if image.mode != "F" and (high > 255 or image.mode != "I") else 255
    scale = 255 / wide if image.mode != "F" or high > 1 else 255.0
    if not 0 <= low <= high <= wide:  # NaN too
        raise InputError(f"a picture of mode {image.mode} with values from {low:g} to {high:g}; expected 0 to {wide}")
    return Image.fromarray((values * scale).astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return _converted(picture, "RGB")
    picture = _converted(picture, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    with _readable(picture):
        return picture.convert(mode)


def _size(size: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
    width, height = (own if given is None else given for given, own in zip((width, height), size, strict=True))
    if min(width, height) < 8:
        raise InputError(f"a picture of {width} x {height} pixels is too small; each side needs 8 or more")
    return width - width % 8, height - height % 8


def _from_pil(picture: Image.Image) -> Tensor:
    planes = torch.from_numpy(np.atleast_3d(np.array(picture, np.float32) / 255))  # (H, W, C)
    return planes.permute(2, 0, 1)[None].contiguous()  # (1, C, H, W)


def _checked(values: Tensor | NDArray[Any], channels: int, lowest: float) -> Tensor:
    with _readable(values):
        planes = torch.as_tensor(values, dtype=torch.float32)
    planes = planes.reshape((1,) * (4 - planes.ndim) + planes.shape)
    if planes.ndim != 4 or planes.shape[1] != channels:
        raise InputError(f"a picture of shape {tuple(planes.shape)} has not {channels} flat channels")
    if not bool(((planes >= lowest) & (planes <= 1)).all()):  # NaN too
        raise InputError(f"the picture's values are not all within {lowest:g} to 1")
    return planes


def _resized(planes: Tensor, width: int | None, height: int | None) -> Tensor:
    width, height = _size((planes.shape[3], planes.shape[2]), width, height)
    if (height, width) == tuple(planes.shape[2:]):
        return planes
    smooth = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return smooth.clamp(-1, 1)


def _parameters(metadata: Mapping[str, object]) -> str:
    size = "{width}x{height}".format_map(metadata) if {"width", "height"} <= metadata.keys() else None
    values = {**metadata, "size": size}
    named = {key: values.get(name) for name, (key, _, _) in PARAMETERS.items()}
    settings = ", ".join(f"{key}: {value}" for key, value in named.items() if value is not None)
    negative = f"\nNegative prompt: {values['negative_prompt']}" if values.get("negative_prompt") else ""
    return f"{values.get('prompt', '')}{negative}\n{settings}"


def _foreign(text: str) -> dict[str, Any]:
    head, _, last = text.strip().rpartition("\n")
    if not last.startswith("Steps: "):
        head, last = text, ""
    prompt, _, negative = f"\n{head}".partition("\nNegative prompt:")
    found: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    for name, (key, value, kind) in PARAMETERS.items():
        if match := re.search(f"(?:^|, ){key}: ({value})", last):
            found[name] = kind(match[1])
    if size := found.pop("size", None):
        found["width"], found["height"] = map(int, size.split("x"))
    return found
