"""Tars and tables that are broken on purpose: what is wrong is said, at no cost, and what is good is read."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  which the children need not import each
from PIL import Image

from fewstep.data.filter_inputs import Settings
from fewstep.data.filters import Filter
from fewstep.data.prepare import prepare
from fewstep.data.sources import samples
from fewstep.data.tables import SETTINGS as READER_SETTINGS
from tests.hostile.frame import BYTES, SECONDS, Outcome, assert_cheap, attempt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

SETTINGS = Settings(
    filter=Filter(min_size=16, min_aesthetic=None, max_watermark=None, max_unsafe=None),
    side=64,
    step=16,
    max_hamming=None,
)
MEGA = 1 << 20


def read_all(path: Path) -> None:
    for _ in samples(path):
        pass


def assert_told(outcome: Outcome, damage: str) -> None:
    """The damage, or none, in words that a terminal shows as they are."""
    assert outcome.kind == ("DamageError" if damage else ""), f"{outcome.kind}: {outcome.words[:300]}"
    assert damage in outcome.words
    assert outcome.words.isprintable() or not outcome.words, repr(outcome.words)
    assert len(outcome.words) < 2500, outcome.words
    assert_cheap(outcome)


def picture(seed: int = 0, side: int = 64) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), ((37 * seed) % 256, 100, 200)).save(data, "PNG")
    return data.getvalue()


# tars


def header(name: bytes, size: int = 0, kind: bytes = b"0", **fields: tuple[int, bytes]) -> bytes:
    """A ustar header, whose `fields` are written over it at their places."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[136:148] = b"%011o\0" % 0
    block[156:157] = kind
    block[257:265] = b"ustar\0" + b"00"
    for place, value in fields.values():
        block[place : place + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0", **fields: tuple[int, bytes]) -> bytes:
    return header(name, len(data), kind, **fields) + data + bytes(-len(data) % 512)


END = bytes(1024)
GOOD = member(b"good.png", picture()) + member(b"good.txt", b"good") + END


def pax(*records: bytes) -> bytes:
    return member(b"pax", b"".join(records), b"x")


TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "one byte": (lambda: b"\x80", "not a tar file"),
    "a web page": (lambda: b"<html>\x1b[2J" + b"x" * 9000, "not a tar file"),
    "gzip": (lambda: b"\x1f\x8b" + b"x" * 2000, "compressed"),
    "zeros": (lambda: bytes(8 * MEGA), ""),
    "a million letters": (lambda: b"ustar" * 200_000, "not a tar file"),
    "only magic words": (lambda: (bytes(257) + b"ustar" + bytes(250)) * 40_000, "not a tar file"),
    "a pax header of 200 kB of digits": (lambda: pax(b"1" * 200_000) + GOOD, "cannot be read"),
    "a pax header of 1 MB of records": (lambda: pax(b"8 a=bcd\n" * 131_072) + GOOD, "cannot be read"),
    "a pax header of 20 MB": (lambda: header(b"p", 20 * MEGA, b"x") + bytes(20 * MEGA) + GOOD, "cannot be read"),
    "1000 pax headers of 20 kB": (lambda: pax(b"8 a=bcd\n" * 2500) * 1000 + GOOD, "faults more"),
    "a chain of 20,000 long names": (lambda: member(b"l", b"a.png\0", b"L") * 20_000 + GOOD, ""),
    "a chain of 20,000 long names and no member": (lambda: member(b"l", b"a\0", b"L") * 20_000 + END, "belongs to no"),
    "a chain of 20,000 global headers": (lambda: member(b"g", b"8 a=bcd\n", b"g") * 20_000 + GOOD, ""),
    "a long name of 20 MB": (lambda: header(b"l", 20 * MEGA, b"L") + bytes(20 * MEGA) + GOOD, "cannot be read"),
    "a size of 2^80": (lambda: header(b"a.png", 2**80) + GOOD, "ends within"),
    "a pax size of 2^63": (lambda: pax(b"28 size=9223372036854775807\n") + member(b"a.png", b"x"), "ends within"),
    "5,000 empty members": (lambda: header(b"a.png") * 5_000 + END, ""),
    "5,000 names": (lambda: b"".join(header(b"%d.png" % i) for i in range(5_000)) + END, ""),
    "5,000 names in folders of folders": (
        lambda: b"".join(header(b"a/" * 40 + b"%d.png" % i) for i in range(5_000)) + END, "",
    ),
    "20,000 wrong checksums": (lambda: header(b"a.png").replace(b"ustar", b"ustar", 1)[:500] + b"x" * 12 + (
        (header(b"a.png")[:500] + b"x" * 12) * 20_000) + GOOD, "no readable header"),
    "10,000 gaps": (lambda: (b"x" * 512 + header(b"a.png")) * 10_000 + END, "faults more"),
    "a map without end": (lambda: header(b"a.png", 0, b"S", more=(482, b"\1")) + b"\1" * (8 * MEGA), "ends within"),
    "six members of 200 MB under one key": (lambda: b"", ""),
    "a caption of 60 MB": (lambda: member(b"a.txt", b"a " * (30 * MEGA)) + GOOD, ""),
    "JSON of 1 MB of lists": (lambda: member(b"a.json", b"[" * (MEGA - 1)) + GOOD, ""),
    "JSON of 1 MB of dictionaries": (lambda: member(b"a.json", b'{"a":[' + b"{}," * 340_000 + b"{}]}") + GOOD, ""),
    "JSON of 1 MB of digits": (lambda: member(b"a.json", b'{"width":' + b"9" * 1_000_000 + b"}") + GOOD, ""),
    "a name of escape codes": (lambda: header(b"\x1b]0;x\x07.png", 10**9) + GOOD, "ends within"),
    "a name of both directions": (lambda: header("\u202egnp.exe".encode(), 10**9), "ends within"),
}  # fmt: skip


def sparse_file(path: Path, *pieces: bytes | int) -> None:
    """A file of bytes and of holes of so many bytes."""
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.seek(piece, io.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate()


@pytest.mark.parametrize("name", TARS)
def test_tars(tmp_path: Path, name: str) -> None:
    make, damage = TARS[name]
    path = tmp_path / "a.tar"
    path.write_bytes(make())
    if name.startswith("six members"):
        kinds = (b"jpg", b"jpeg", b"png", b"webp", b"txt", b"json")
        sparse_file(path, *(p for kind in kinds for p in (header(b"a." + kind, 200 * MEGA), 200 * MEGA)), END)
    assert_told(attempt(lambda: read_all(path)), damage)


def test_a_file_of_ten_terabytes_of_nothing(tmp_path: Path) -> None:
    try:
        sparse_file(tmp_path / "a.tar", GOOD, 10**13)
    except OSError:
        pytest.skip("this file system holds no such files")
    assert_told(attempt(lambda: read_all(tmp_path / "a.tar")), "not searched")


# pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *others: bytes, colour: int = 2, depth: int = 8) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(others) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, 20 bytes for 8 million pixels, stands there so many times."""
    data = io.BytesIO()
    Image.new("RGB", (2800, 2800), "grey").save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + whole[-2:]


PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not_a_picture"),
    "no pixels": (lambda: png(0, 0, b""), "damaged_picture not_a_picture"),
    "no width": (lambda: png(0, 64, b""), "damaged_picture not_a_picture"),
    "2^31 pixels": (lambda: png(2**15, 2**16, b""), "too_large"),
    "2^62 pixels": (lambda: png(2**31 - 1, 2**31 - 1, b""), "too_large"),
    "60 million pixels in 60 kB": (lambda: png(7700, 7700, bytes(7700 * (3 * 7700 + 1))), "too_large"),
    "pixels of another file": (lambda: png(64, 64, bytes(20 * MEGA)), ""),
    "a line of a million pixels": (lambda: png(1, 1_000_000, bytes(4_000_000)), "too_small"),
    "60 compressed texts of 1 MB": (
        lambda: png(64, 64, bytes(64 * 193), *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MEGA - 9)))] * 60),
        "damaged_picture ",
    ),
    "a compressed colour profile of 50 MB": (
        lambda: png(64, 64, bytes(64 * 193), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50 * MEGA)))),
        "damaged_picture ",
    ),
    "half a file": (lambda: picture(1, 200)[:60], "damaged_picture"),
    "2000 scans of 8 million pixels": (lambda: many_scans(2000), "damaged_picture"),
    "a palette that is missing": (lambda: png(64, 64, bytes(64 * 65), colour=3), "damaged_picture "),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path: Path, name: str) -> None:
    make, reasons = PICTURES[name]
    data = make()
    (tmp_path / "a.tar").write_bytes(member(b"a.png", data) + member(b"a.txt", b"red") + GOOD)
    prepare_one = attempt(lambda: prepare([tmp_path / "a.tar"], tmp_path / "out", SETTINGS))
    assert not prepare_one.kind, prepare_one
    assert_cheap(prepare_one)
    rejected = (tmp_path / "out" / "rejected.csv").read_text().splitlines()[1:]
    assert [row.rpartition(",")[2] for row in rejected] in [[r] if r else [] for r in reasons.split(" ")]


# tables


def table(columns: dict[str, Any], **settings: Any) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, **settings)
    return file.getvalue()


def arrow_array(kind: str, values: list[Any], storage: str = "") -> Any:
    """An array of `kind`, whose bits may be those of another kind."""
    import pyarrow

    made = pyarrow.array(values, getattr(pyarrow, storage or kind)())
    return made.view(getattr(pyarrow, kind)()) if storage else made


def binary_as_text(*values: bytes) -> Any:
    import pyarrow

    made = pyarrow.array(list(values), pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(made), made.buffers())


def dates(value: int) -> Any:
    import pyarrow

    return pyarrow.array([0, value, 0], pyarrow.int64()).view(pyarrow.timestamp("us"))


def few() -> dict[str, Any]:
    return {"image": [picture(i) for i in range(3)], "caption": ["a", "b", "c"]}


def varint(number: int) -> bytes:
    """As the footer writes it: 7 bits a byte, the lowest first, and the sign in the lowest bit."""
    number, out = number * 2, b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def claiming_less() -> bytes:
    """A value of 120 MB in 4 kB, of which the footer says that it has 2 MB."""
    from pyarrow import parquet

    data = table({"image": [bytes(120 * MEGA)]}, compression="zstd", use_dictionary=False)
    size = parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).total_uncompressed_size
    at = data.rindex(varint(size))
    return data[:at] + varint(2_000_000) + data[at + len(varint(size)) :]


def footer_cut(data: bytes, length: int) -> bytes:
    return data[:-8] + struct.pack("<I", length) + b"PAR1"


def junk_in_footer(seed: int) -> bytes:
    import random

    data = bytearray(table(few()))
    length = struct.unpack("<I", data[-8:-4])[0]
    chance = random.Random(seed)
    for _ in range(4):
        data[-8 - chance.randrange(1, length)] = chance.randrange(256)
    return bytes(data)


ANY = "any"
TABLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a readable parquet file"),
    "magic alone": (lambda: b"PAR1PAR1", "not a readable parquet file"),
    "no footer": (lambda: b"PAR1" + b"x" * 100, "not a readable parquet file"),
    "a footer of 4 GB": (lambda: footer_cut(table(few()), 2**32 - 1), "not a readable parquet file"),
    "a footer of nothing": (lambda: footer_cut(table(few()), 0), "not a readable parquet file"),
    "a footer of zeros": (lambda: b"PAR1" + bytes(200) + struct.pack("<I", 200) + b"PAR1", "not a readable"),
    "a footer of 10 MB of lists": (
        lambda: b"PAR1" + b"\x19" * (10 * MEGA) + struct.pack("<I", 10 * MEGA) + b"PAR1", "not a readable",
    ),
    "half a file": (lambda: (d := table(few()))[: len(d) // 2], "not a readable parquet file"),
    **{f"junk in a footer, {seed}": (lambda seed=seed: junk_in_footer(seed), ANY) for seed in range(12)},
    "pages of junk": (lambda: (d := table(few()))[:4] + b"\xee" * 300 + d[304:], ANY),
    "a value of 120 MB of zeros": (
        lambda: table({"image": [bytes(120 * MEGA)], "caption": ["a"]}, compression="zstd"), "claims",
    ),
    "a value whose size the footer denies": (claiming_less, "row group 0"),
    "a caption of 100 MB of blanks": (
        lambda: table({"image": [picture()], "caption": [" " * (100 * MEGA)]}, compression="zstd"), "claims",
    ),
    "a value of 3 MB that is used 100 times": (
        lambda: table({"image": [bytes(3 * MEGA)] * 100, "caption": ["a"] * 100}, compression="zstd"), ANY,
    ),
    "a million rows in a few bytes": (lambda: table({"caption": ["a"] * 1_000_000}), "claims"),
    "2000 row groups": (lambda: table({"caption": ["a"] * 2000}, row_group_size=1), ""),
    "3000 columns": (lambda: table({f"c{i}": [1] for i in range(3000)}), ""),
    "a text that is no UTF-8": (lambda: table(few() | {"caption": binary_as_text(b"a", b"\xff\xfe", b"c")}), ""),
    "a date of the year 292,000": (lambda: table(few() | {"md5": dates(2**63 - 1)}), ""),
    "lists in lists as a caption": (lambda: table(few() | {"caption": [[["a"] * 9] * 9] * 3}), ""),
    "two columns of one name": (lambda: table(few() | {"IMAGE": [b"", b"", b""]}), ""),
    "a picture that is a text": (lambda: table(few() | {"image": ["a", "b", "c"]}), ""),
    "an encrypted file": (lambda: b"PARE" + bytes(100) + struct.pack("<I", 50) + b"PARE", "not a readable"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow.parquet")
    make, damage = TABLES[name]
    (tmp_path / "a.parquet").write_bytes(make())
    outcome = attempt(lambda: read_all(tmp_path / "a.parquet"))
    if damage is ANY:
        damage = outcome.words
        assert outcome.kind in ("", "DamageError"), outcome
    assert_told(outcome, damage)


READER = """
import json, sys, resource
from pathlib import Path
from fewstep.data.tables import PICTURE_COLUMNS
from fewstep.data.table_rows import serve
serve(sys.argv[1], json.dumps(["caption", "md5"]), json.dumps(PICTURE_COLUMNS))
spent = resource.getrusage(resource.RUSAGE_SELF)
lines = Path("/proc/self/status").read_text().splitlines()
memory = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
print(memory, spent.ru_utime + spent.ru_stime, file=sys.stderr)
"""
COSTLY = [
    name for name in TABLES if any(word in name for word in ("value", "caption", "rows", "groups", "lists", "3000"))
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the memory of a process")
@pytest.mark.parametrize("name", COSTLY)
def test_the_process_that_reads_a_table_stays_small(tmp_path: Path, name: str) -> None:
    """pyarrow alone takes 60 MB."""
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(TABLES[name][0]())
    command = [sys.executable, "-c", READER, tmp_path / "a.parquet"]
    settings = os.environ | READER_SETTINGS
    read = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=settings, check=True)
    memory, seconds = read.stderr.split()
    assert int(memory) << 10 < 64 * MEGA + BYTES
    assert float(seconds) < SECONDS


@pytest.mark.parametrize("name", ["junk in a footer, 0", "no footer", "a value of 120 MB of zeros"])
def test_a_damaged_table_beside_a_tar_costs_its_rows_alone(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(TABLES[name][0]())
    (tmp_path / "a.tar").write_bytes(GOOD)
    assert prepare([tmp_path], tmp_path / "out", SETTINGS).accepted == 1


def test_one_row_that_cannot_be_read_is_one_picture_less(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    for name in ("a text that is no UTF-8", "a date of the year 292,000"):
        (tmp_path / "a.parquet").write_bytes(TABLES[name][0]())
        manifest = prepare([tmp_path / "a.parquet"], tmp_path / name, SETTINGS)
        assert (manifest.samples, manifest.accepted) == (3, 2)
        assert manifest.rejected["damaged_metadata"] == 1


def test_a_good_tar_behind_each_broken_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "z.tar").write_bytes(GOOD)
    for number, name in enumerate(["one byte", "a chain of 20,000 long names", "a size of 2^80", "gzip"]):
        (tmp_path / f"{number}.tar").write_bytes(TARS[name][0]())
    manifest = prepare([tmp_path], tmp_path / "out", SETTINGS)
    assert manifest.accepted >= 1
    assert len(manifest.damaged) == 3
    assert tarfile.is_tarfile(tmp_path / "out" / "shards" / manifest.shards[0]["name"])
