"""Where images are written: file names with the seed, and no file overwritten without consent."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fewstep.errors import InputError, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

    from fewstep import Result

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The folder that images go to; `name` of the file, or None for names by seed; `piped`: to stdout instead."""

    folder: Path
    name: str | None = None
    piped: bool = False


def destination(output: str | None) -> Destination:
    """Where `--output` leads: a file, an existing folder or one that ends with a slash, or `-` for stdout.

    InputError if nothing can be written there, before any work is done.
    """
    if output == "-":
        return _to_stdout()
    path = Path(output or ".")
    if output is None or path.is_dir() or output.endswith(("/", os.sep)):
        target = Destination(folder=path)
    else:
        target = Destination(folder=path.parent, name=_file_name(path))
    folder = target.folder
    if target.name is None and not folder.exists():
        folder = next(parent for parent in folder.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"--output {quoted(output)}: there is no folder {quoted(folder)}; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {quoted(output)}: the folder {quoted(folder)} cannot be written to; choose another")
    return target


def check_vacant(where: Destination, images: int, *, force: bool) -> None:
    """InputError if one of so many `images` would overwrite a file without --force or consent."""
    if where.piped:
        if images != 1:
            raise InputError(f"--output - writes one image, not {images}; name a folder, as in --output images/")
        return
    if where.name is None:
        return
    taken = [path for path in paths(where, range(images)) if path.exists()]
    if odd := next((path for path in taken if not path.is_file()), None):
        raise InputError(f"--output {quoted(odd)} is there already and is no file; choose another name")
    if taken and not force and not _confirmed(taken):
        raise InputError(f"{listed(taken)} there already; overwrite with --force, or choose another --output")


def listed(files: Sequence[Path], most: int = 3) -> str:
    """Names of files for a sentence, with its verb: `'a.png' is`, `'a.png', 'b.png' and 7 others are`."""
    names = ", ".join(quoted(path) for path in files[:most])
    more = f" and {len(files) - most} others" if len(files) > most else ""
    return f"{names}{more} {'are' if len(files) > 1 else 'is'}"


def paths(where: Destination, seeds: Sequence[int]) -> list[Path]:
    """One path for each of `seeds`: the file that was named, numbered if there are several images.

    Without a file name they are `fewstep-<seed>.png`, and a name that is taken gets a number.
    """
    if where.name is None:
        return [_unused_path(where.folder, f"fewstep-{seed}") for seed in seeds]
    named = where.folder / where.name
    if len(seeds) == 1:
        return [named]
    return [named.with_stem(f"{named.stem}-{number}") for number in range(1, len(seeds) + 1)]


def save(result: Result, settings: Mapping[str, Any], where: Destination) -> list[Path]:
    """Write every image of `result` with `settings` and its own seed; the paths written, none for stdout."""
    if where.piped:
        with tempfile.TemporaryDirectory() as folder:
            [path] = save(result, settings, Destination(folder=Path(folder)))
            sys.stdout.buffer.write(path.read_bytes())
        return []
    where.folder.mkdir(parents=True, exist_ok=True)
    written = paths(where, result.seeds)
    for path, image, seed in zip(written, result.images, result.seeds, strict=True):
        write(replace(result, images=(image,), seeds=(seed,)), image, path, {**settings, "seed": seed})
    return written


def write(result: Result, image: Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write one image, in the format of its path's ending, with `settings`."""
    from fewstep import images

    if path.suffix.lower() == ".png":
        images.save_png(image, path, settings)
    else:
        named: Any = replace(result, settings=settings)
        named.save(path)


def show(written: Iterable[Path]) -> None:
    """Print paths for programs: byte by byte as the system has them."""
    for path in written:
        typer.echo(os.fsencode(path))


def _to_stdout() -> Destination:
    if sys.stdout.isatty():
        raise InputError("--output - writes an image's bytes, and stdout is a terminal; send them to a program")
    return Destination(folder=Path(), piped=True)


def _file_name(path: Path) -> str:
    """The file's name with an ending that says how images are written; PNG where it has none."""
    if not path.suffix:
        return f"{path.name}.png"
    if path.suffix.lower() not in ENDINGS:
        one = quoted(path.with_suffix(".png"))
        raise InputError(f"--output {quoted(path)}: images are written as {', '.join(ENDINGS)}; use {one}")
    return path.name


def _confirmed(taken: Sequence[Path]) -> bool:
    """Whether a person at the terminal lets these files go."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{listed(taken)} there already; overwrite? [y/N]", end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _unused_path(folder: Path, stem: str) -> Path:
    return next(path for path in _candidates(folder, stem) if not path.exists())


def _candidates(folder: Path, stem: str) -> Iterator[Path]:
    return (folder / f"{stem}{suffix}.png" for suffix in chain([""], (f"-{number}" for number in count(2))))
