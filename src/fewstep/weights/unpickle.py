"""Torch archives (.ckpt, .bin, .pt), read without running anything that is in them.

Three doors, one behind the other: the archive's directory is checked, the pickle's instructions are scanned against
a list of allowed names before any of them is followed, and only then torch reads it with `weights_only`.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import CheckpointError
from fewstep.weights.files import MOST_TENSORS, TensorFile

MOST_ENTRIES = 10_000
LARGEST_PICKLE = 64_000_000  # bytes; that of SD 1.4 has 0.2 million
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "_codecs encode",  # how protocol 2 writes bytes
    *(f"torch {name}Storage" for name in _STORAGES),
}
_STUBBED = {  # what else the trainers of published files left in them; read as nothing, never imported
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "numpy dtype",
}
_REFUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


class _Nothing:
    """Stands for an object of a training program: takes any arguments, keeps none."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_torch(path: Path) -> TensorFile:
    """The tensors of a torch archive, mapped into memory; CheckpointError for an unsafe or broken file.

    Only the `state_dict` of a training checkpoint is taken.
    """
    _scan_pickle(path, _checked_pickle(path))
    if path.suffix == ".safetensors":  # torch would go by the name
        raise CheckpointError(f"{path} is a torch archive in spite of its name; rename it to .ckpt")
    stubs: list[Any] = [(_Nothing, name.replace(" ", ".")) for name in _STUBBED]
    try:
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if not 0 < len(tensors) <= MOST_TENSORS:
        raise CheckpointError(f"{path} holds {len(tensors)} tensors; expected 1 to {MOST_TENSORS}")
    steps = content.get("global_step")
    return TensorFile(
        path=path,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        read=lambda name, _: tensors[name],
        notes={"global_step": str(steps)} if isinstance(steps, int) else {},
    )


def _checked_pickle(path: Path) -> bytes:
    """The archive's one pickle, after its directory was found harmless."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
                raise CheckpointError(f"{path} is a zip archive without the data.pkl of one torch checkpoint")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is a broken or cut zip archive ({error}); download it again") from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MOST_ENTRIES:
        raise CheckpointError(f"{path} has {len(entries)} entries; a checkpoint has at most {MOST_ENTRIES}")
    for entry in entries:
        name = entry.filename
        if ".." in name.split("/") or name.startswith("/") or "\\" in name:
            raise CheckpointError(f"{path} holds {name!r}, a name that leaves its folder")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(f"{path} holds {name!r} compressed or encrypted; torch stores plainly")
    total = sum(entry.file_size for entry in entries)
    if total > 2 * path.stat().st_size:
        raise CheckpointError(f"{path} would unpack to {total:,} bytes, over twice its size: a zip bomb")


def _scan_pickle(path: Path, pickle: bytes) -> None:
    """Raises CheckpointError for a pickle that would import, or do, what no tensor needs."""
    try:
        wanted = {
            str(argument) if opcode.name == "GLOBAL" else f"instruction {opcode.name}"
            for opcode, argument, _ in pickletools.genops(pickle)
            if opcode.name == "GLOBAL" or opcode.name in _REFUSED
        }
    except Exception as error:  # pickletools promises no kind
        raise CheckpointError(f"{path} holds a broken pickle: {error}") from error
    for name in sorted(wanted - _ALLOWED - _STUBBED):
        raise CheckpointError(
            f"{path} asks for {name.replace(' ', '.')!r}, which is not among the {len(_ALLOWED)} names that tensors "
            "need; nothing was run. Convert it to .safetensors where it is trusted"
        )
