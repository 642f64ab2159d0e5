"""Files of weights that are broken on purpose: each is refused in our own words, in no time, with no memory."""

# ruff: noqa: E501

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.formats.tensors import TensorFile
from fewstep.weights.load import open_tensors
from tests.hostile.frame import assert_cheap, assert_refused, attempt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def read_all(path: Path) -> list[torch.Tensor]:
    file: TensorFile = open_tensors(path)
    return [file.read(name, mapped) for name in file.shapes for mapped in (True, False)]


# safetensors


def safetensors(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\x80",
    "half a length": lambda: b"\x08\0\0\0",
    "a length alone": lambda: struct.pack("<Q", 100),
    "a length beyond 64 bits of file": lambda: safetensors(one(), length=2**64 - 1),
    "a header of 57 MB": lambda: safetensors(b'{"a":"' + b"x" * 57_000_000 + b'"}'),
    "a header of 7 MB of lists": lambda: safetensors(b'{"a":' + b"[" * 7_000_000),
    "a header of 7 MB of dictionaries": lambda: safetensors(b"{" + b",".join(b'"%d":{}' % i for i in range(700_000)) + b"}"),
    "a header of 7 MB of numbers": lambda: safetensors(b'{"a":[' + b"1," * 3_500_000 + b"1]}"),
    "too many tensors": lambda: safetensors({str(i): EMPTY for i in range(20_001)}, b""),
    "nested 100,000 deep": lambda: safetensors(b'{"a":' * 100_000),
    "a number of 5,000 digits": lambda: safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
    "offsets that are no numbers": lambda: safetensors(one(data_offsets=["0", "8"])),
    "offsets that are NaN": lambda: safetensors(one(data_offsets=[float("nan"), 8])),
    "offsets that are fractions": lambda: safetensors(one(data_offsets=[0.5, 8.5])),
    "negative offsets": lambda: safetensors(one(data_offsets=[-8, 8])),
    "three offsets": lambda: safetensors(one(data_offsets=[0, 8, 16])),
    "no offsets": lambda: safetensors(one(data_offsets=None)),
    "offsets that fall": lambda: safetensors(one(data_offsets=[8, 0])),
    "offsets beyond the file": lambda: safetensors(one(data_offsets=[0, 10**18])),
    "two tensors in one place": lambda: safetensors(one() | {"b": one()["a"]}),
    "a hole between tensors": lambda: safetensors(one() | {"b": one(data_offsets=[16, 24])["a"]}, b"\0" * 24),
    "a shape that is a number": lambda: safetensors(one(shape=2)),
    "a shape of texts": lambda: safetensors(one(shape=["2"])),
    "a shape that is true": lambda: safetensors(one(shape=[True, 2])),
    "a shape that is huge": lambda: safetensors(one(shape=[2**62, 2**62])),
    "no shape": lambda: safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "a dtype that is a list": lambda: safetensors(one(dtype=["F32"])),
    "a dtype that nobody has": lambda: safetensors(one(dtype="\x1b[31mF99")),
    "a tensor that is a text": lambda: safetensors({"a": "tensor"}),
    "metadata that are a list": lambda: safetensors(one() | {"__metadata__": [1]}),
    "metadata that are nested": lambda: safetensors(one() | {"__metadata__": {"a": {"b": 1}}}),
    "a header that is a list": lambda: safetensors([1, 2]),
    "a header that is no UTF-8": lambda: safetensors(b'{"\xff\xfe":1}'),
    "a name of escape codes": lambda: safetensors({"\x1b]0;owned\x07\u202e": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
    "a name of 400 letters": lambda: safetensors({"x" * 400: one()["a"]}),
    "a name of a million letters": lambda: safetensors({"x" * 1_000_000: {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
    "a gzip archive": lambda: b"\x1f\x8b\x08" + b"\0" * 64,
    "a web page": lambda: b"\n <!DOCTYPE html><title>\x1b[2J</title>",
    "a git-lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "zeros": lambda: bytes(4096),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[name]())
    assert_refused(attempt(lambda: read_all(path)))


def test_a_header_whose_length_looks_like_json_is_read(tmp_path: Path) -> None:
    """The length 0x7b20 begins with a blank and a brace."""
    text = json.dumps(one())
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(text.encode() + b" " * (0x7B20 - len(text))))
    outcome = attempt(lambda: read_all(path))
    assert not outcome.kind, outcome.words
    assert_cheap(outcome)


# torch archives


def saved(content: Any = None) -> dict[str, bytes]:
    """The members of what torch saves."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0)} if content is None else content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(members: dict[str, bytes] | list[tuple[str, bytes]], **settings: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **settings) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return buffer.getvalue()


def around(pickled: bytes, data: bytes = bytes(16)) -> bytes:
    return zipped({"archive/data.pkl": pickled, "archive/data/0": data})


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"


def tensor(
    offset: bytes = b"K\0", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85", storage: bytes = STORAGE
) -> bytes:
    """A pickle of {"a": tensor}."""
    view = storage + offset + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + view + b"s."


def two_directories() -> bytes:
    """A reader that trusts the end sees one directory, a reader that searches from the front another."""
    honest = around(tensor())
    place = honest.index(b"PK\x01\x02")
    directory, end = honest[place:-22], honest[-22:]
    other = directory.replace(b"archive/data.pkl", b"archive/datb.pkl")
    return honest[:place] + other + directory + end


def patched(content: bytes, magic: bytes, at: int, value: bytes) -> bytes:
    """Some bytes of the first record that starts with `magic` changed."""
    place = content.index(magic) + at
    return content[:place] + value + content[place + len(value) :]


def many_entries() -> bytes:
    content = bytearray(around(tensor()))
    content[-14:-10] = struct.pack("<2H", 60_000, 60_000)
    return bytes(content)


def long_number() -> bytes:
    return b"I" + b"9" * 5000 + b"\n."


def encodings(levels: int) -> bytes:
    """Text that each level encodes to twice its length and decodes again, were it followed."""
    text = b"X\x10\0\0\0" + b"\xc3\xbf" * 8
    return b"\x80\x02" + b"c_codecs\nencode\n(" * levels + text + b"X\x05\0\0\0utf-8tR" * levels + b"."


PAIRS = b"N\x85q\0" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(40))
"""Forty levels, each of which holds the one before twice: as a tree more than any machine can walk through."""


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


# Forty pairs, each of the one before twice: what walks through the last one never ends.
PAIRED = b"Nq\x000" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(40)) + b"h\x28"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
LONG_NUMBER = b"\x8b" + struct.pack("<i", 4_000_000) + b"\x01" * 4_000_000


HONEST = around(tensor())
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "two directories": two_directories,
    "bytes before it": lambda: b"PK\x03\x04" + HONEST,
    "bytes behind it": lambda: HONEST + b"\0" * 8,
    "a comment": lambda: HONEST[:-2] + b"\x04\0evil",
    "cut in the middle": lambda: HONEST[: len(HONEST) // 2],
    "without its end": lambda: HONEST[:-22],
    "its end alone": lambda: b"PK\x03\x04" + HONEST[-22:],
    "more entries than a directory holds": many_entries,
    "entries that the directory lacks": lambda: patched(HONEST, b"PK\x05\x06", 8, struct.pack("<2H", 9, 9)),
    "a directory elsewhere": lambda: patched(HONEST, b"PK\x05\x06", 16, struct.pack("<L", 4)),
    "a directory of another size": lambda: patched(HONEST, b"PK\x05\x06", 12, struct.pack("<L", 10**9)),
    "two disks": lambda: patched(HONEST, b"PK\x05\x06", 4, struct.pack("<H", 1)),
    "one name twice": lambda: zipped([("a/data.pkl", tensor()), ("a/data/0", bytes(16)), ("a/data/0", bytes(16))]),
    "another name in front of the data": lambda: patched(HONEST, b"PK\x03\x04", 30, b"archive/datb.pkl"),
    "another size in front of the data": lambda: patched(HONEST, b"PK\x03\x04", 22, struct.pack("<L", 3)),
    "another checksum in front of the data": lambda: patched(HONEST, b"PK\x03\x04", 14, b"\1\2\3\4"),
    "a wrong checksum in both places": lambda: patched(patched(HONEST, b"PK\x03\x04", 14, b"\1\2\3\4"), b"PK\x01\x02", 16, b"\1\2\3\4"),
    "compressed in front of the data alone": lambda: patched(HONEST, b"PK\x03\x04", 8, struct.pack("<H", 8)),
    "members that overlap": lambda: patched(HONEST, b"PK\x01\x02", 42, struct.pack("<L", 8)),
    "a size beyond the file": lambda: patched(patched(HONEST, b"PK\x01\x02", 20, struct.pack("<2L", 2**31, 2**31)), b"PK\x03\x04", 18, struct.pack("<2L", 2**31, 2**31)),
    "a bomb": lambda: zipped({"archive/data.pkl": bytes(30_000_000)}, compression=zipfile.ZIP_DEFLATED),
    "encrypted": lambda: patched(HONEST, b"PK\x01\x02", 8, struct.pack("<H", 1)),
    "60,000 members": lambda: zipped([(f"archive/data/{i}", b"") for i in range(60_000)]),
    "a name of 60,000 letters": lambda: zipped({"archive/" + "x" * 60_000: b"", **saved()}),
    "a name with escape codes": lambda: zipped({"archive/\x1b[2J/../x": b"", **saved()}),
    "no pickle": lambda: zipped({"archive/data/0": bytes(16)}),
    "two pickles": lambda: zipped({"a/data.pkl": tensor(), "b/data.pkl": tensor()}),
    "a pickle of 9 MB": lambda: around(b"\x80\x02" + b"N0" * 4_500_000 + b"N."),
    "another byte order": lambda: zipped({**saved(), "archive/byteorder": b"big"}),
    "a byte order of 70 MB": lambda: zipped({**saved(), "archive/byteorder": bytes(70_000_000)}),
    "no numbers": lambda: zipped({"archive/data.pkl": tensor()}),
    "fewer numbers": lambda: around(tensor(), bytes(12)),
    "more numbers": lambda: around(tensor(), bytes(20)),
    # pickles
    "strides of 0": lambda: around(tensor(shape=b"J\0\0\0\x40\x85", strides=b"K\0\x85")),
    "a shape beyond the numbers": lambda: around(tensor(shape=b"K\x05\x85")),
    "an offset beyond the numbers": lambda: around(tensor(offset=b"K\x01")),
    "a negative offset": lambda: around(tensor(offset=b"J\xff\xff\xff\xff")),
    "a negative shape": lambda: around(tensor(shape=b"J\xff\xff\xff\xff\x85")),
    "negative strides": lambda: around(tensor(strides=b"J\xff\xff\xff\xff\x85")),
    "a shape of fractions": lambda: around(tensor(shape=b"G@\x10\0\0\0\0\0\0\x85")),
    "a shape that is true": lambda: around(tensor(shape=b"\x88\x85")),
    "a shape that is a text": lambda: around(tensor(shape=b"X\x01\0\0\x004")),
    "a shape of 9 dimensions": lambda: around(tensor(shape=b"(" + b"K\x01" * 9 + b"t", strides=b"(" + b"K\x01" * 9 + b"t")),
    "strides of other dimensions": lambda: around(tensor(strides=b"K\x01K\x01\x86")),
    "a storage that is none": lambda: around(tensor(storage=b"K\x01")),
    "a storage of another kind": lambda: around(tensor(storage=STORAGE.replace(b"storage", b"storagf"))),
    "a storage elsewhere": lambda: around(tensor(storage=STORAGE.replace(b"0X\x03", b"/X\x03"))),
    "a storage of fractions": lambda: around(tensor(storage=STORAGE.replace(b"K\x04tQ", b"G@\x10\0\0\0\0\0\0tQ"))),
    "a storage of 2^62 numbers": lambda: around(tensor(storage=STORAGE.replace(b"K\x04tQ", b"\x8a\x08\0\0\0\0\0\0\0\x40tQ"))),
    "one text encoded again and again": lambda: around(encodings(40)),
    "a long text encoded a thousand times": lambda: around(b"\x80\x02X" + struct.pack("<I", 1_000_000) + b"x" * 1_000_000 + b"q\0" + b"c_codecs\nencode\n(h\0X\x06\0\0\0latin1tR0" * 1000 + b"N."),
    "a long list made a dictionary a thousand times": lambda: around(b"\x80\x02](" + b"NN\x86" * 100_000 + b"eq\0" + b"ccollections\nOrderedDict\nh\0\x85R0" * 1000 + b"N."),
    "pairs of pairs as a key": lambda: around(b"\x80\x02" + PAIRS + b"}h\x28Ns."),
    "pairs of pairs as a shape": lambda: around(b"\x80\x02" + PAIRS + b"0" * 41 + tensor(shape=b"h\x28\x85")[2:]),
    "pairs of pairs as a storage": lambda: around(b"\x80\x02" + PAIRS + b"0" * 41 + tensor(storage=STORAGE.replace(b"X\x01\0\0\x000", b"h\x28"))[2:]),
    "pairs of pairs as an encoding": lambda: around(b"\x80\x02" + PAIRS + b"c_codecs\nencode\n(X\x01\0\0\0ah\x28tR."),
    "a number of 4 MB as a key again and again": lambda: around(b"\x80\x02\x8b" + struct.pack("<i", 4_000_000) + b"\x01" * 4_000_000 + b"q\0}" + b"h\0Ns" * 100_000 + b"."),
    "places of the memory that collide": lambda: around(b"\x80\x02N" + b"".join(b"p%d\n" % (i * (2**61 - 1) + 5) for i in range(200_000)) + b"."),
    "149,000 dictionaries": lambda: around(b"\x80\x02" + b"}" * 149_000 + b"."),
    "a fraction of 8 MB": lambda: around(b"\x80\x02F" + b"9" * 7_900_000 + b"\n."),
    "a million instructions": lambda: around(b"\x80\x02" + b"N0" * 150_001 + b"N."),
    "tuples 100,000 deep": lambda: around(b"\x80\x02N" + b"\x85" * 100_000 + b"."),
    "lists 100,000 deep": lambda: around(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "marks alone": lambda: around(b"\x80\x02" + b"(" * 100_000 + b"."),
    "more taken off than was put on": lambda: around(b"\x80\x020000."),
    "a memory of nothing": lambda: around(b"\x80\x02h\x05."),
    "a number of 5,000 digits": lambda: around(long_number()),
    "a text longer than the file": lambda: around(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "a key of pairs of pairs": lambda: around(b"\x80\x02}" + PAIRED + b"Ns."),
    "an item of pairs of pairs": lambda: around(b"\x80\x02ccollections\nOrderedDict\n]" + PAIRED + b"N\x86a\x85R."),
    "a shape of pairs of pairs": lambda: around(tensor(shape=PAIRED + b"\x85")),
    "a storage of pairs of pairs": lambda: around(tensor(storage=STORAGE.replace(b"X\x01\0\0\x000", PAIRED))),
    "an encoding of pairs of pairs": lambda: around(b"\x80\x02c_codecs\nencode\n(X\x01\0\0\0a" + PAIRED + b"tR."),
    "keys of 4 MB": lambda: around(b"\x80\x02" + LONG_NUMBER + b"q\0}" + b"h\0Ns" * 100_000 + b"."),
    "a text as a shape, a thousand times": lambda: around(b"\x80\x02" + text(b"x" * 1_000_000) + b"q\0" + REBUILD + b"q\1(" + STORAGE + b"K\0h\0h\0tq\2" + b"h\1h\2R" * 1000 + b"."),
    "a list as a shape, a thousand times": lambda: around(b"\x80\x02](" + b"N" * 100_000 + b"eq\0" + REBUILD + b"q\1(" + STORAGE + b"K\0h\0h\0tq\2" + b"h\1h\2R" * 1000 + b"."),
    "149,000 sets": lambda: around(b"\x80\x04" + b"\x8f" * 149_000 + b"."),
    "149,000 lists": lambda: around(b"\x80\x02" + b"]" * 149_000 + b"."),
    "numbers of values that collide": lambda: around(b"\x80\x02N" + b"".join(b"p%d\n" % (i * (2**61 - 1) + 5) for i in range(200_000)) + b"."),
    "numbers shown twice": lambda: around(tensor(shape=b"K\x02K\x02\x86", strides=b"K\x01K\x01\x86")),
    "a name of 400 letters": lambda: around(tensor().replace(b"X\x01\0\0\0a", text(b"a" * 400))),
    "an unknown instruction": lambda: around(b"\x80\x02\xff."),
    "no end": lambda: around(b"\x80\x02N"),
    "two values": lambda: around(b"\x80\x02NN."),
    "a program": lambda: around(b"cos\nsystem\n(X\x02\0\0\0idtR."),
    "a program by its attributes": lambda: around(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n."),
    "a program by protocol 4": lambda: around(pickle.dumps(print, 4)),
    "a program with a long name": lambda: around(b"c" + b"a" * 100_000 + b"\n\x1b[31mevil\n."),
    "a number that is called": lambda: around(b"\x80\x02K\x01)R."),
    "a dtype that is called": lambda: around(b"\x80\x02ctorch\nFloatStorage\n)R."),
    "attributes of a name": lambda: around(b"\x80\x02ccollections\nOrderedDict\n}b."),
    "keys that cannot be": lambda: around(b"\x80\x02}]Ns."),
    "items for what has none": lambda: around(b"\x80\x02K\x01NNs."),
    "another process's buffer": lambda: around(b"\x80\x05\x97."),
    "a persistent text": lambda: around(b"Pfile:///etc/passwd\n."),
    "a list": lambda: around(pickle.dumps([1, 2], 2)),
    "no tensors": lambda: around(pickle.dumps({"a": 1}, 2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ARCHIVES)
def test_torch_archives(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(ARCHIVES[name]())
    assert_refused(attempt(lambda: read_all(path)))


@pytest.mark.parametrize("aligned", [True, False])
def test_what_torch_and_others_write_is_read(tmp_path: Path, aligned: bool) -> None:
    """Views of one storage among it, and members that begin anywhere."""
    base = torch.arange(24.0)
    content = {
        "whole": base,
        "turned": base.view(4, 6).T,
        "part": base[5:9],
        "empty": torch.zeros(0, 3),
        "half": base.half(),
    }
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    if not aligned:
        path.write_bytes(zipped(saved(content)))
    file = open_tensors(path)
    assert all(torch.equal(file.read(name, True), content[name]) for name in content)


def test_one_archive_is_read_by_many_threads(tmp_path: Path) -> None:
    """And leaves no rule behind in the process."""
    from concurrent.futures import ThreadPoolExecutor

    path, before = tmp_path / "model.ckpt", torch.serialization.get_safe_globals()
    torch.save({"state_dict": {"a": torch.arange(1000.0)}, "global_step": 1}, path)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: open_tensors(path).read("a", True).sum().item(), range(64)))
    assert set(found) == {499500.0}
    assert torch.serialization.get_safe_globals() == before


# names that are no files


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, ending: str) -> None:
    pipe, folder = tmp_path / f"pipe{ending}", tmp_path / f"folder{ending}"
    os.mkfifo(pipe)
    folder.mkdir()
    long = tmp_path / ("x" * 300 + ending)
    for path in (pipe, folder, long, Path("/dev/zero"), Path(f"{tmp_path}/null\0byte{ending}"), tmp_path / "gone"):
        assert_refused(attempt(lambda path=path: read_all(path)))


def test_short_memory_is_named_with_the_file_and_the_numbers(tmp_path: Path) -> None:
    import resource

    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(50_000_000)}, path)

    def read() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        file = open_tensors(path)
        file.read("a", False)

    outcome = attempt(read)
    assert outcome.kind == "CheckpointError", outcome
    assert str(path) in outcome.words
    assert "memory" in outcome.words.lower()
