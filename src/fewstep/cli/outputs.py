"""Where pictures are written: names that say the seed, and no file lost that was not named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import InputError

if TYPE_CHECKING:
    from fewstep import Result


def check(output: Path | None) -> None:
    """InputError if nothing can be written to `output`: told before the work, not after it."""
    folder = folder_of(output)
    if not folder.is_dir():
        raise InputError(f"--output {output}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {output}: the folder {folder} cannot be written to; choose another")
    if output and not output.is_dir() and output.suffix.lower() not in ("", ".png"):
        raise InputError(f"--output {output}: pictures are written as PNG; use {output.with_suffix('.png')}")


def folder_of(output: Path | None) -> Path:
    """The folder that pictures for `output` go to."""
    if output is None:
        return Path()
    return output if output.is_dir() else output.parent


def paths(output: Path | None, seeds: Sequence[int]) -> list[Path]:
    """One path for each of `seeds`: the file `output`, numbered if there are several pictures.

    Without a file name they are `fewstep-<seed>.png`, and a name that is taken gets a number.
    """
    if output is None or output.is_dir():
        return [_free(folder_of(output), f"fewstep-{seed}") for seed in seeds]
    named = output.with_suffix(".png")
    if len(seeds) == 1:
        return [named]
    return [named.with_stem(f"{named.stem}-{number}") for number in range(1, len(seeds) + 1)]


def save(result: Result, settings: Mapping[str, Any], output: Path | None) -> list[Path]:
    """Write every picture of `result` as a PNG with `settings` and its own seed; the paths written."""
    from fewstep import images

    written = paths(output, result.seeds)
    for path, image, seed in zip(written, result.images, result.seeds, strict=True):
        images.save_png(image, path, {**settings, "seed": seed})
    return written


def _free(folder: Path, stem: str) -> Path:
    return next(path for path in _candidates(folder, stem) if not path.exists())


def _candidates(folder: Path, stem: str) -> Iterator[Path]:
    return (folder / f"{stem}{suffix}.png" for suffix in chain([""], (f"-{number}" for number in count(2))))
