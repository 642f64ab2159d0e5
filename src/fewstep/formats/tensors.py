"""Files of tensors: what a file really is, and the tensors in it, mapped into memory or read one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import CheckpointError, quoted
from fewstep.files import file_size, reading
from fewstep.memory import is_short_of_memory

Shape = tuple[int, ...]

LARGEST_HEADER = 8_000_000  # bytes; that of SDXL has 0.3 million
MOST_TENSORS = 20_000
LONGEST_NAME = 300  # characters of a tensor's; models have 110
MOST_BRACKETS = 200_000  # three for each tensor, and what trainers note as texts
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_FOREIGN = (  # how a file starts, what it is, what to do
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder"),
    ((b"<!doctype", b"<html"), "an HTML page", "download the file itself, not the page that shows it"),
    (b"gguf", "a GGUF file", "fewstep reads .safetensors and .ckpt"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89png", "a PNG picture", "give the file of weights"),
    (b"{", "a JSON text", "give the file of weights"),
)


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The names, shapes and number formats in one or more files, and `read`, which takes a name to its tensor.

    `read(name, True)` maps the tensor into memory, `read(name, False)` copies it, and frees the file's pages.
    """

    path: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str, bool], Tensor]
    notes: Mapping[str, str] = field(default_factory=dict)


def kind_of(path: Path) -> str:
    """`"safetensors"` or `"torch"` by what the file holds, whatever it is called; CheckpointError for another file."""
    with reading(path):
        size = file_size(path)
        with path.open("rb") as file:
            start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    for magic, what, advice in _FOREIGN:
        if start.lstrip().lower().startswith(magic):
            raise CheckpointError(f"{path} is {what}; {advice}")
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start[0] == 0x80 and start[1:2] < b"\x06":
        raise CheckpointError(
            f"{path} is a bare pickle, which can run any program; convert it to .safetensors where it is trusted"
        )
    return "safetensors"


def read_safetensors(path: Path) -> TensorFile:
    """The tensors of a .safetensors file, after its header was checked; CheckpointError says what is wrong with it."""
    with reading(path):
        entries, data = _header(path)
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise CheckpointError(f"{path} has metadata that is no dictionary of texts; download it again")
    check_names(path, entries)
    with reading(path):
        try:
            mapped: Callable[[str], Tensor] = safe_open(path, framework="pt").get_tensor
        except SafetensorError as error:
            if is_short_of_memory(error):
                raise MemoryError(f"{path.stat().st_size} bytes are mapped") from error
            raise CheckpointError(f"{path} is not a safetensors file: {quoted(str(error), 200)[1:-1]}") from error

    def read(name: str, keep_mapped: bool) -> Tensor:
        with reading(path):
            return mapped(name) if keep_mapped else copied(name)

    def copied(name: str) -> Tensor:
        start, end = entries[name]["data_offsets"]  # read, since mapped pages count as memory until all is done
        buffer = torch.empty(end - start, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(data + start)
            if file.readinto(buffer.numpy().data) != end - start:
                raise CheckpointError(f"{path} ended while it was read; was it replaced meanwhile?")
        return buffer.view(dtypes[name]).reshape(shapes[name])

    dtypes = {name: _DTYPES.get(entry["dtype"], torch.int64) for name, entry in entries.items()}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return TensorFile(path=path, shapes=shapes, dtypes=dtypes, read=read, notes=notes)


def check_names(path: Path, names: Collection[str]) -> None:
    """CheckpointError for more tensors, or longer names of them, than any model of this family has."""
    if len(names) > MOST_TENSORS:
        raise CheckpointError(f"{path} holds {len(names)} tensors; no model of this family has over {MOST_TENSORS}")
    if (longest := max(map(len, names), default=0)) > LONGEST_NAME:
        raise CheckpointError(f"{path} names a tensor in {longest:,} characters; models need {LONGEST_NAME} at most")


def joined(path: Path, files: Iterable[TensorFile]) -> TensorFile:
    """The shards of one model as one file; CheckpointError when two of them hold the same name."""
    owner: dict[str, TensorFile] = {}
    for file in files:
        if twice := owner.keys() & file.shapes.keys():
            raise CheckpointError(f"{path}: two shards hold {min(twice)!r}; download them again")
        owner |= dict.fromkeys(file.shapes, file)
    check_names(path, owner)
    return TensorFile(
        path=path,
        shapes={name: file.shapes[name] for name, file in owner.items()},
        dtypes={name: file.dtypes[name] for name, file in owner.items()},
        read=lambda name, keep_mapped: owner[name].read(name, keep_mapped),
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data starts."""
    size = file_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or file.read(1) != b"{":
            raise CheckpointError(f"{path} is not a safetensors file, nor a torch archive; it has no header")
        if length > LARGEST_HEADER:
            cut = " and is cut short" if length > size else ""
            raise CheckpointError(
                f"{path} has a header of {length:,} bytes{cut}; models have {LARGEST_HEADER:,} at most"
            )
        start = b"{" + file.read(length - 1)
    if start.count(b"{") + start.count(b"[") > MOST_BRACKETS or start.count(b",") > 4 * MOST_BRACKETS:
        raise CheckpointError(f"{path} has a header of more parts than {MOST_TENSORS:,} tensors need")
    try:
        header = json.loads(start)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        cut = " and is cut short" if len(start) < length else ""
        raise CheckpointError(f"{path} has a safetensors header that cannot be read{cut}; download it again") from error
    if 8 + length + end > size:
        raise CheckpointError(f"{path} is cut short: its header promises {8 + length + end:,} bytes, it has {size:,}")
    return header, 8 + length
