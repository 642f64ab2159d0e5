"""Torch archives (.ckpt, .bin, .pt), read without running anything that is in them.

A pickle is a program. Its instructions are followed here one by one, and all that they can make is numbers, texts,
lists, dictionaries and descriptions of tensors: no name in it is ever imported or called. Neither torch's nor Python's
unpickler sees the file; the tensors are mapped from where the archive's checked directory says that they lie.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.errors import CheckpointError, quoted
from fewstep.files import reading
from fewstep.formats.archive import Member, read_directory, read_member
from fewstep.formats.tensors import TensorFile, check_names

LARGEST_PICKLE = 8_000_000  # bytes; that of SD 1.4 has 0.2 million
MOST_INSTRUCTIONS = 150_000  # one of SDXL has about 80,000
MOST_COPIED = 4_000_000  # characters and items that instructions may copy
MOST_DIMENSIONS = 8
LITTLE = b"little"  # the order of bytes
LONGEST_KEY = 100  # characters of a storage's name, which is a number

_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_STUBBED = {  # what else the trainers of published files left in them; read as nothing
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "numpy dtype",
}
_KNOWN = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "_codecs encode",  # how protocol 2 writes bytes
    *_DTYPES,
    *_STUBBED,
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_VALUES = (
    {"FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE"}
    | {f"{name}{width}" for name in ("BINUNICODE", "BINBYTES") for width in ("", "8")}
    | {"SHORT_BINUNICODE", "SHORT_BINBYTES"}
)


class Name(NamedTuple):
    """A name that a pickle asks for: never imported."""

    text: str


class Storage(NamedTuple):
    """Numbers of an archive: the member `key` holds `length` of them."""

    key: str
    dtype: torch.dtype
    length: int


class Described(NamedTuple):
    """A tensor that has not been read: a view of a storage, of as many strides as dimensions, all numbers 0 or more."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> TensorFile:
    """The tensors of a torch archive, mapped into memory; CheckpointError for an unsafe or broken file.

    Only the `state_dict` of a training checkpoint is taken.
    """
    with reading(path):
        return _archive(path)


def _archive(path: Path) -> TensorFile:
    members = read_directory(path)
    root = _root(path, members)
    order = members.get(f"{root}/byteorder")
    if order and (order.size != len(LITTLE) or read_member(path, order) != LITTLE):
        raise CheckpointError(f"{path} was written on a machine of another byte order; save it on a usual one")
    try:
        content = Interpreter().run(read_member(path, members[f"{root}/data.pkl"]))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # pickletools promises no kind, and the instructions may be any
        raise CheckpointError(f"{path} holds a broken pickle: {quoted(str(error))}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in state.items() if isinstance(value, Described) and isinstance(name, str)}
    if not tensors:
        raise CheckpointError(f"{path} holds 0 tensors; there is nothing to load")
    check_names(path, tensors)
    places = {name: _place(path, members, root, name, tensor) for name, tensor in tensors.items()}
    steps, mapped = content.get("global_step"), torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    return TensorFile(
        path=path,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.storage.dtype for name, tensor in tensors.items()},
        read=lambda name, _: _read(mapped, places[name], tensors[name]),
        notes={"global_step": str(steps)} if isinstance(steps, int) and abs(steps) < 10**12 else {},
    )


def _root(path: Path, members: Mapping[str, Member]) -> str:
    """The folder in the archive that holds its one pickle."""
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1 or members[pickles[0]].size > LARGEST_PICKLE:
        raise CheckpointError(f"{path} is a zip archive without the data.pkl of one torch checkpoint")
    return pickles[0].split("/")[0]


def _place(path: Path, members: Mapping[str, Member], root: str, name: str, tensor: Described) -> Member:
    """The member that holds a tensor's numbers; CheckpointError unless all of them are in it, once each."""
    storage = tensor.storage
    member = members.get(f"{root}/data/{storage.key}")
    if member is None or member.size != storage.length * storage.dtype.itemsize:
        raise CheckpointError(f"{path}: the numbers of {quoted(name)} are missing or not {storage.length:,}")
    if not _is_view(tensor):
        raise CheckpointError(f"{path}: {quoted(name)} is no view of {storage.length:,} numbers: {quoted(tensor[1:])}")
    return member


def _is_view(tensor: Described) -> bool:
    """Whether all numbers of a tensor lie in its storage, and none is shown more than once."""
    last = 0
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return False
        last += max(0, size - 1) * stride
    return 0 in tensor.shape or tensor.offset + last < tensor.storage.length


def _read(file: Tensor, member: Member, tensor: Described) -> Tensor:
    """The tensor in the mapped `file`, apart from all others in it; copied where its numbers are not aligned."""
    numbers = file.untyped_storage()[member.start : member.start + member.size]
    with reading(member.name):
        if member.start % tensor.storage.dtype.itemsize:
            numbers = numbers.clone()
        return torch.empty(0, dtype=tensor.storage.dtype).set_(numbers, tensor.offset, tensor.shape, tensor.strides)


class Interpreter:
    """Follows a pickle's instructions with values of its own.

    A value may hold another one twice, and so forty levels of pairs stand for more than any machine can walk through:
    nothing here hashes, compares or prints what holds others. Dictionaries keep the entries that are named by texts.
    CheckpointError for an instruction or a name that no tensors need, and for more work than any checkpoint needs.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, pickle: bytes) -> Any:
        """What the pickle describes: numbers, texts, lists, dictionaries, `Described` tensors."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if number > MOST_INSTRUCTIONS:
                raise CheckpointError(f"holds a pickle of over {MOST_INSTRUCTIONS:,} instructions")
            self._follow(opcode.name, argument)
        (result,) = self.stack
        return result

    def _follow(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _NUMBERS:
            self.stack.append(_number(argument))
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            index = len(self.memo) if argument is None else argument
            if index > MOST_INSTRUCTIONS:
                raise ValueError("a value is kept under a number that no pickle reaches")
            self.memo[index] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            step = _STEPS.get(name)
            if step is None:
                raise CheckpointError(f"holds the instruction {name}, which tensors do not need; nothing was run")
            step(self, argument)

    def marked(self) -> list[Any]:
        """What was put on the stack since the last mark, taken off it."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def count(self, items: Any) -> None:
        """Count what is copied: the same long text a million times is work too."""
        self.copied += len(items)
        if self.copied > MOST_COPIED:
            raise CheckpointError("holds a pickle that copies more than any checkpoint needs")

    def call(self, function: Any, arguments: Any) -> Any:
        """What a name stands for with these arguments."""
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("something is called that is no function")
        match function.text.split()[-1]:
            case "_rebuild_tensor_v2":
                return _described(*arguments[:4])
            case "_rebuild_parameter":
                return arguments[0]
            case "encode":
                text, encoding = arguments
                if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
                    raise ValueError("bytes are written in another way than as latin1")
                self.count(text)
                return text.encode("latin1")
            case "OrderedDict":
                (pairs,) = arguments or ([],)
                if not isinstance(pairs, list):
                    raise ValueError("a dictionary is made of no list of pairs")
                self.count(pairs)
                return _named(pairs)
        if function.text in _STUBBED:
            return None
        raise ValueError(f"{function.text} is called")

    def name(self, text: str) -> Name:
        """A name of the few that checkpoints need."""
        if text not in _KNOWN:
            raise CheckpointError(
                f"asks for {quoted(text.replace(' ', '.'))}, which is not among the {len(_KNOWN)} names that tensors "
                "need; nothing was run. Convert it to .safetensors where it is trusted"
            )
        return Name(text)


def _storage(machine: Interpreter, _: Any) -> None:
    kind, name, key, _place, count = machine.stack.pop()
    right = isinstance(name, Name) and isinstance(key, str) and len(key) <= LONGEST_KEY and _are_counts(count)
    if kind != "storage" or not right:
        raise ValueError("a storage is described in another way")
    machine.stack.append(Storage(key, _DTYPES[name.text], count))


def _described(storage: Any, offset: Any, shape: Any, strides: Any) -> Described:
    right = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not right or not len(shape) == len(strides) <= MOST_DIMENSIONS or not _are_counts(offset, *shape, *strides):
        raise ValueError("a tensor is no view of a storage")
    return Described(storage, offset, shape, strides)


def _are_counts(*numbers: Any) -> bool:
    return all(type(number) is int and 0 <= number < 2**48 for number in numbers)


def _number(value: int) -> int:
    if value.bit_length() > 64:
        raise ValueError("a whole number has over 64 bits")
    return value


def _named(pairs: Iterable[Any]) -> dict[str, Any]:
    return {name: value for name, value in pairs if isinstance(name, str)}


def _pushed(make: Callable[[Interpreter], Any]) -> Callable[[Interpreter, Any], None]:
    return lambda machine, _: machine.stack.append(make(machine))


def _call(machine: Interpreter, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, arguments))


def _last(count: int) -> Callable[[Interpreter], tuple[Any, ...]]:
    def take(machine: Interpreter) -> tuple[Any, ...]:
        items = machine.stack[-count:]
        del machine.stack[-count:]
        return tuple(items)

    return take


def _set_items(machine: Interpreter, items: list[Any]) -> None:
    machine.stack[-1].update(_named(zip(items[::2], items[1::2], strict=True)))


_STEPS: dict[str, Callable[[Interpreter, Any], Any]] = {
    "GLOBAL": lambda machine, text: machine.stack.append(machine.name(text)),
    "BINPERSID": _storage,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": lambda machine, _: machine.stack.pop(),  # attributes, of which tensors and dictionaries need none
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.marked(),
    "TUPLE": _pushed(lambda machine: tuple(machine.marked())),
    "LIST": _pushed(lambda machine: machine.marked()),
    "TUPLE1": _pushed(_last(1)),
    "TUPLE2": _pushed(_last(2)),
    "TUPLE3": _pushed(_last(3)),
    "APPEND": lambda machine, _: machine.stack[-2].append(machine.stack.pop()),
    "APPENDS": lambda machine, _: machine.stack[machine.marks[-1] - 1].extend(machine.marked()),
    "SETITEM": lambda machine, _: _set_items(machine, list(_last(2)(machine))),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.marked()),
}
