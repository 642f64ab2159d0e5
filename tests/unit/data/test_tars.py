"""Tars as people make them: every member is part of a picture with its own caption, or is counted with a reason."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fewstep.cli import main
from fewstep.data.columns import decoded_text
from fewstep.data.executor import ShardExecutor
from fewstep.data.filter_inputs import PART, Settings
from fewstep.data.filters import Filter
from fewstep.data.manifest import Manifest
from fewstep.data.prepare import prepare
from fewstep.data.raw import DamageError, Leftover, RawSample
from fewstep.data.shards import open_shards
from fewstep.data.sources import samples
from fewstep.errors import InputError

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (250, 250, 250)}
RULE = Filter(min_size=16, min_aesthetic=None, max_watermark=None, max_unsafe=None)
SETTINGS = Settings(filter=RULE, side=64, step=16, max_hamming=None)

Members = list[tuple[str, bytes]]


def picture(colour: str, side: int = 64, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), COLOURS[colour]).save(data, kind)
    return data.getvalue()


RED, BLUE, GREEN = picture("red"), picture("blue"), picture("green")


def tar(*members: tuple[str | tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def special(name: str, type_: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, link
    return info, b""


def read(path: Path) -> tuple[list[RawSample], dict[str, str], str | None]:
    """The pictures, the members that are part of none with their reasons, and the damage."""
    found: list[RawSample] = []
    unused: dict[str, str] = {}
    try:
        for each in samples(path):
            if isinstance(each, Leftover):
                unused[each.name] = each.reason.value
            else:
                found.append(each)
    except DamageError as error:
        return found, unused, str(error)
    return found, unused, None


def told(found: list[RawSample]) -> list[tuple[str | None, str | None, str | None]]:
    """Of each picture its colour, its caption and its fault."""
    names = {RED: "red", BLUE: "blue", GREEN: "green"}
    return [(names.get(each.picture), each.record.caption, each.fault) for each in found]


FAULT = (None, None, "damaged_metadata")
R, B = ("red", "red", None), ("blue", "blue", None)
PAIRS: dict[str, tuple[Members, list[tuple[str | None, str | None, str | None]], dict[str, str]]] = {
    "side by side": ([("a.png", RED), ("a.txt", b"red"), ("b.png", BLUE), ("b.txt", b"blue")], [R, B], {}),
    "pictures first, then captions": (
        [("a.png", RED), ("b.png", BLUE), ("a.txt", b"red"), ("b.txt", b"blue")], [R, B], {},
    ),
    "captions first, in another order": (
        [("b.txt", b"blue"), ("a.txt", b"red"), ("a.png", RED), ("b.png", BLUE)], [B, R], {},
    ),
    "one key twice": ([("a.png", RED), ("a.txt", b"red"), ("a.png", BLUE), ("a.txt", b"blue")], [R, B], {}),
    "one key twice, of which nobody knows whose the caption is": (
        [("a.png", RED), ("a.png", BLUE), ("a.txt", b"red")],
        [(None, None, "ambiguous_key"), (None, None, "ambiguous_key")],
        {},
    ),
    "upper and lower case endings of one name": (
        [("a.png", RED), ("a.PNG", BLUE), ("a.txt", b"red")],
        [(None, None, "ambiguous_key"), (None, None, "ambiguous_key")],
        {},
    ),
    "names with dots": (
        [("photo.v1.png", RED), ("photo.v1.txt", b"red"), ("photo.v2.png", BLUE), ("photo.v2.txt", b"blue")],
        [R, B],
        {},
    ),
    "names with dots beside one without": (
        [("photo.png", RED), ("photo.txt", b"red"), ("photo.v2.png", BLUE), ("photo.v2.txt", b"blue")], [R, B], {},
    ),
    "webdataset's further members": (
        [("0.png", RED), ("0.seg.png", GREEN), ("0.txt", b"red"), ("0.cls", b"7"), ("0.depth.npy", b"x")],
        [R],
        {"0.seg.png": "second_member", "0.cls": "other_kind", "0.depth.npy": "other_kind"},
    ),
    "two pictures of one name": (
        [("a.jpg", RED), ("a.txt", b"red"), ("a.png", BLUE)], [R], {"a.png": "second_member"},
    ),
    "folders": (
        [("x/a.png", RED), ("x/a.txt", b"red"), ("y/a.png", BLUE), ("y/a.txt", b"blue")], [R, B], {},
    ),
    "./ before some": ([("./a.png", RED), ("a.txt", b"red"), (".//b.png", BLUE), ("./b.txt", b"blue")], [R, B], {}),
    "names of Windows": ([("x\\a.png", RED), ("x/a.txt", b"red")], [R], {}),
    "upper case endings": ([("A.PNG", RED), ("A.TXT", b"red"), ("B.Png", BLUE), ("B.txt", b"blue")], [R, B], {}),
    "files of macOS": (
        [("._a.png", b"\0\5\x16\7"), ("a.png", RED), ("a.txt", b"red"), (".DS_Store", b"x"), ("__MACOSX/a.png", RED)],
        [R],
        {"._a.png": "hidden", ".DS_Store": "hidden", "__MACOSX/a.png": "hidden"},
    ),
    "no ending": ([("README", b"hi"), (".png", RED), ("a.png", RED), ("a.txt", b"red")], [R], {
        "README": "other_kind", ".png": "hidden",
    }),
    "a caption without a picture": ([("a.txt", b"red")], [(None, "red", None)], {}),
    "a picture without a caption": ([("a.png", RED)], [("red", None, None)], {}),
    "an empty caption, and JSON": ([("a.png", RED), ("a.txt", b""), ("a.json", b'{"text": "red"}')], [R], {}),
    "two captions": ([("a.png", RED), ("a.caption", b"a red one"), ("a.txt", b"red")], [R], {}),
    "a byte order mark": ([("a.png", RED), ("a.txt", b"\xef\xbb\xbfred"), ("b.png", BLUE),
                           ("b.json", b'\xef\xbb\xbf{"caption": "blue"}')], [R, B], {}),
    "UTF-16": ([("a.png", RED), ("a.txt", "red".encode("utf-16"))], [R], {}),
    "Latin letters": ([("a.png", RED), ("a.txt", "caf\xe9".encode("latin-1"))], [("red", "caf\xe9", None)], {}),
    "binary data as a caption": ([("a.png", RED), ("a.txt", b"r\0e\0d\0")], [FAULT], {}),
    "UTF-8 that is damaged": (
        [("a.png", RED), ("a.txt", "caf\xe9 f\xfcr".encode()[:-2] + b"\xff")], [FAULT], {},
    ),
    "a caption of two megabytes": ([("a.png", RED), ("a.txt", b"x" * (2 << 20))], [FAULT], {}),
    "JSON nested deep": ([("a.png", RED), ("a.json", b"[" * 100_000)], [FAULT], {}),
    "a number of 5000 digits": ([("a.png", RED), ("a.json", b"[" + b"9" * 5000 + b"]")], [FAULT], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_each_picture_has_its_own_caption_and_no_member_is_forgotten(tmp_path, name):
    members, expected, unused = PAIRS[name]
    (tmp_path / "a.tar").write_bytes(tar(*members))
    found, left, damage = read(tmp_path / "a.tar")
    assert told(found) == expected
    assert (left, damage) == (unused, None)
    assert sum(each.members for each in found) + len(left) == len(members)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_whole_in_every_format(tmp_path, form):
    folder = "/".join(["a_folder_with_a_name"] * 7)
    (tmp_path / "a.tar").write_bytes(
        tar((f"{folder}/{'x' * 90}.png", RED), (f"{folder}/{'x' * 90}.txt", b"red"), form=form)
    )
    found, unused, damage = read(tmp_path / "a.tar")
    assert (told(found), unused, damage) == ([R], {}, None)
    assert found[0].record.key == f"{folder}/{'x' * 90}"


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_what_tar_writes_is_read(tmp_path, form):
    """`tar cf x.tar *.png *.txt`, in which no caption stands beside its picture; a sparse file and links among them."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in (("a", RED), ("b.v1", BLUE)):
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text("red" if name == "a" else "blue")
    (folder / "c.png").symlink_to("a.png")
    (folder / "d.png").hardlink_to(folder / "a.png")
    with (folder / "e.png").open("wb") as sparse:
        sparse.truncate(10 << 20)
    names = [path.name for kind in ("png", "txt") for path in sorted(folder.glob(f"*.{kind}"))]
    flags = ["--sparse"] if form not in ("v7", "ustar") else []
    command = ["tar", f"--format={form}", *flags, "-cf", tmp_path / "x.tar", "-C", folder, *names]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this tar does not know the format")
    found, unused, damage = read(tmp_path / "x.tar")
    links = {"c.png": "link", "d.png": "link"} | ({"e.png": "special"} if flags else {})
    assert (unused if form != "pax" else dict(zip(links, unused.values(), strict=True)), damage) == (links, None)
    assert told(found)[:2] == [R, B]


def test_two_tars_joined_are_both_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(("0.png", RED), ("0.txt", b"red")) + tar(("0.png", BLUE), ("0.txt", b"blue")))
    assert told(read(tmp_path / "a.tar")[0]) == [R, B]


def test_members_that_are_no_files_are_counted(tmp_path):
    kinds = {"x": tarfile.DIRTYPE, "l.png": tarfile.LNKTYPE, "s.png": tarfile.SYMTYPE, "f.png": tarfile.FIFOTYPE}
    others = [special(name, kind, "a.png") for name, kind in kinds.items()]
    (tmp_path / "a.tar").write_bytes(tar(*others, ("a.png", RED), ("a.txt", b"red")))
    found, unused, _ = read(tmp_path / "a.tar")
    assert told(found) == [R]
    assert list(unused.values()) == ["folder", "link", "link", "special"]


# Damage within: the members around it are read


def broken(members: bytes, name: bytes, change: dict[int, bytes], mend: bool = True) -> bytes:
    """A tar with bytes of the header of `name` changed, and its checksum mended."""
    data = bytearray(members)
    start = data.index(name)
    for place, value in change.items():
        data[start + place : start + place + len(value)] = value
    if mend:
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


THREE: Members = [
    ("a.png", RED), ("a.txt", b"red"), ("m.png", GREEN), ("m.txt", b"green"), ("b.png", BLUE), ("b.txt", b"blue"),
]  # fmt: skip
WHOLE = tar(*THREE)
GREEN_ALONE = [("green", None, None)]
INSIDE: dict[str, tuple[bytes, str | None]] = {
    "a wrong checksum": (broken(WHOLE, b"m.png", {10: b"?"}, mend=False), "no readable header at byte"),
    "a size that is no number": (broken(WHOLE, b"m.png", {124: b"zzz"}), "no readable header at byte"),
    "a negative size": (broken(WHOLE, b"m.png", {124: b"\xff" * 12}), "no readable header at byte"),
    "a size beyond the file": (broken(WHOLE, b"m.png", {124: b"77777777777"}), "ends within 'm.png'"),
    "a size of 80 bits": (broken(WHOLE, b"m.png", {124: b"\x80\x01" + bytes(10)}), "ends within 'm.png'"),
    "a date that is no number": (broken(WHOLE, b"m.png", {136: b"zzz"}), None),
    "a date of the year 10^20": (broken(WHOLE, b"m.png", {136: b"\x80" + b"\x7f" * 11}), None),
    "owners and devices of junk": (broken(WHOLE, b"m.png", {100: b"\xfe" * 24, 329: b"\xfe" * 16}), None),
    "a header of junk": (broken(WHOLE, b"m.png", {0: b"\xaa" * 512}, mend=False), "no readable header at byte"),
    "a kind that nobody knows": (broken(WHOLE, b"m.png", {156: b"\xe9"}), None),
    "a name that is no UTF-8": (broken(WHOLE, b"m.png", {0: b"m\xff\xfe.png"}), None),
    "a name of escape codes": (broken(WHOLE, b"m.png", {0: b"\x1b]0;x\x07\n.png"}), None),
}


@pytest.mark.parametrize("name", INSIDE)
def test_damage_within_a_tar_costs_one_member(tmp_path, name):
    data, damage = INSIDE[name]
    (tmp_path / "a.tar").write_bytes(data)
    found, _, said = read(tmp_path / "a.tar")
    assert [each for each in told(found) if each in (R, B)] == [R, B]
    assert said is None if damage is None else damage in said
    manifest = prepared(tmp_path, tmp_path / "a.tar")
    assert manifest.accepted in (2, 3)
    assert not (tmp_path / "out" / "rejected.csv").read_text().count("\x1b")


def extended(type_: bytes, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo("././@LongLink")
    info.type = type_
    return info, data


def with_extensions(*extensions: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Red and blue, and between them green with extended headers."""
    ends = [bytes(-len(data) % 512) for _, data in extensions]
    file = io.BytesIO()
    red, green, blue = (tar((f"{n}.png", data), (f"{n}.txt", n.encode())) for n, data in
                        (("red", RED), ("green", GREEN), ("blue", BLUE)))  # fmt: skip
    file.write(red.rstrip(b"\0") + bytes(-len(red.rstrip(b"\0")) % 512))
    for (info, data), end in zip(extensions, ends, strict=True):
        info.size = len(data)
        file.write(info.tobuf(tarfile.USTAR_FORMAT) + data + end)
    file.write(green.rstrip(b"\0") + bytes(-len(green.rstrip(b"\0")) % 512) + blue)
    return file.getvalue()


DAMAGED = "cannot be read"
EXTENSIONS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str | None]] = {
    "long names in a chain": ([extended(b"L", b"green.png\0")] * 1500, None),
    "a long name that is no UTF-8": ([extended(b"L", b"\xff\xfe.png\0")], None),
    "a long name of a megabyte": ([extended(b"L", b"x" * (1 << 20))], DAMAGED),
    "a pax header of two megabytes": ([extended(b"x", b"1" * (2 << 20))], DAMAGED),
    "a pax length of 200,000 digits": ([extended(b"x", b"9" * 200_000)], DAMAGED),
    "a pax length of nothing": ([extended(b"x", b"0 path=a\n")], DAMAGED),
    "a pax length beyond its header": ([extended(b"x", b"99 path=a\n")], DAMAGED),
    "a pax size of no number": ([extended(b"x", b"12 size=1e9\n")], DAMAGED),
    "a pax size of 5000 digits": ([extended(b"x", b"5010 size=" + b"9" * 4999 + b"\n")], DAMAGED),
    "a pax date of no number": ([extended(b"x", b"14 mtime=nan\n\n")], None),
    "a pax date beyond all years": ([extended(b"x", b"17 mtime=1e999999")], DAMAGED),
    "pax records in 200 kB": ([extended(b"x", b"8 a=bcd\n" * 25_000)], DAMAGED),
    "an unknown character set": ([extended(b"x", b"23 hdrcharset=JUNKJUNK\n")], None),
    "global headers of junk": ([extended(b"g", b"\xff" * 5000)], None),
    "a pax header before a pax header": ([extended(b"x", b"12 path=m.p\n")] * 1500, None),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_damaged_extended_headers_cost_one_member(tmp_path, name):
    extensions, damage = EXTENSIONS[name]
    (tmp_path / "a.tar").write_bytes(with_extensions(*extensions))
    found, unused, said = read(tmp_path / "a.tar")
    assert [each for each in told(found) if each in (R, B)] == [R, B]
    if damage is None:
        assert said is None
    else:
        assert damage in said
        assert unused == {"green.png": "damaged_header"}


def prepared(folder: Path, *inputs: Path) -> Manifest:
    return prepare(inputs, folder / "out", SETTINGS)


def test_the_account_holds_every_member(tmp_path):
    """Whatever the members are: those of pictures and those of none are together as many as there are."""
    members = [member for name, (each, _, _) in PAIRS.items() for member in each if "twice" not in name]
    numbered = [(f"{number // 6}/{name}", data) for number, (name, data) in enumerate(members)]
    (tmp_path / "a.tar").write_bytes(tar(*numbered))
    manifest = prepared(tmp_path, tmp_path / "a.tar")
    assert sum(manifest.members.values()) == len(members)
    assert manifest.samples == manifest.accepted + sum(manifest.rejected.values())
    rows = (tmp_path / "out" / "rejected.csv").read_text().splitlines()[1:]
    unused = sum(count for reason, count in manifest.members.items() if reason != PART)
    assert len(rows) == sum(manifest.rejected.values()) + unused
    assert Counter(row.rpartition(",")[2] for row in rows)["hidden"] == manifest.members["hidden"] > 0


def test_captions_of_a_shard_are_those_of_its_pictures(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(("0.png", BLUE), ("0.txt", b"blue"), ("0.png", RED), ("0.txt", b"red")))
    prepared(tmp_path, tmp_path / "a.tar")
    for sample in open_shards(tmp_path / "out").read(range(2)):
        assert sample.image[:, 5, 5].argmax() == ("red", "", "blue").index(sample.caption)


def test_nothing_accepted_is_an_error_that_names_the_reasons(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(tar(("a.png", RED), ("b.gif", b"GIF89a"), ("x.txt", b"no picture")))
    for _ in range(2):  # also when it is given again
        with pytest.raises(
            InputError, match=r"none of 2 pictures was accepted \(1 no_caption, 1 no_picture; .*1 other_kind"
        ):
            prepared(tmp_path, tmp_path / "a.tar")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rejected"]["no_caption"] == 1
    assert main(["data", "prepare", str(tmp_path / "a.tar"), "--out", str(tmp_path / "o"), "-q"]) == 2
    assert "no_caption" in capsys.readouterr().err


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder of a good tar, two damaged ones, and one whose name is no UTF-8."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.tar").write_bytes(b"junk" * 300)
    (folder / "1.tar").write_bytes(INSIDE["a header of junk"][0])
    (folder / "2.tar").write_bytes(tar(("w.png", picture("white")), ("w.txt", b"white")))
    return folder


def test_damaged_inputs_are_named_and_the_others_used(damaged, tmp_path, capsys):
    words = ["data", "prepare", str(damaged), "--out", str(tmp_path / "out"), "--min-size", "64", "--near", "off"]
    off = [word for limit in ("min-aesthetic", "max-watermark", "max-unsafe") for word in (f"--{limit}", "off")]
    for _ in range(2):  # the second run reads what the first found
        assert main([*words, *off]) == 3
        told = capsys.readouterr().err
        assert "nothing could be read of 1 inputs" in told
        assert "0.tar is not a tar file" in told
        assert "1.tar has no readable header at byte" in told
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["accepted"] == 3


def test_damage_is_the_same_for_any_number_of_processes(damaged, tmp_path):
    one = prepare([damaged], tmp_path / "one", SETTINGS)
    assert prepare([damaged], tmp_path / "two", SETTINGS, ShardExecutor(processes=2)) == one
    for name in ("manifest.json", "rejected.csv", "index.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_input_whose_name_is_no_utf8_is_read(tmp_path):
    try:
        path = tmp_path / "b\udcff.tar"
        path.write_bytes(tar(("a.png", RED), ("a.txt", b"red")))
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes no such names")
    assert prepared(tmp_path, path).inputs[0]["name"].endswith(r"b\xff.tar")


def test_an_input_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    (tmp_path / "b.tar").write_bytes(WHOLE)
    real = Path.open

    def refused(path, *given, **named):
        if path.name == "b.tar":
            raise PermissionError(13, "Permission denied")
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    manifest = prepared(tmp_path, tmp_path / "a.tar", tmp_path / "b.tar")
    assert manifest.accepted == 3
    assert "cannot be read: Permission denied" in manifest.damaged[(tmp_path / "b.tar").as_posix()]


def test_a_member_of_200_megabytes_is_refused_before_it_is_read(tmp_path):
    header = tarfile.TarInfo("big.png")
    header.size = 200 << 20
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header.tobuf())
        file.seek(header.size, io.SEEK_CUR)
        file.write(tar(("a.png", RED), ("a.txt", b"red")))
    found, _, damage = read(path)
    assert [each.fault for each in found] == ["too_large", None]
    assert (found[0].picture, damage) == (None, None)


def test_a_narrow_picture_is_not_made_huge(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (1, 60_000)).save(data, "PNG")
    (tmp_path / "a.tar").write_bytes(tar(("a.png", data.getvalue()), ("a.txt", b"a line"), *THREE))
    settings = replace(SETTINGS, side=512, step=64, filter=replace(RULE, min_size=None))
    assert prepare([tmp_path / "a.tar"], tmp_path / "out", settings).rejected["too_large"] == 1


@pytest.mark.parametrize("data", [b"a\0b", b"\x81\x8d", "\xfc\xfc".encode() + b"\xff"])
def test_what_is_no_text_is_said_to_be_none(data):
    with pytest.raises(ValueError, match=r"zero bytes|codec can't decode"):
        decoded_text(data)


def test_a_folder_of_loose_pictures_says_what_to_do(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    with pytest.raises(InputError, match=r"1 pictures: put them into one .*tar cf"):
        prepared(tmp_path, tmp_path)


def test_the_folder_that_is_written_is_no_input(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    first = prepared(tmp_path, tmp_path)
    assert prepared(tmp_path, tmp_path) == first
    assert [each["name"] for each in first.inputs] == [(tmp_path / "a.tar").as_posix()]


def test_work_that_is_lost_or_lacks_memory_names_its_input(tmp_path, monkeypatch):
    task = SimpleNamespace(output=tmp_path / "input-000007.json", source="web/x.tar", die=partial(os._exit, 9))
    with pytest.raises(ChildProcessError, match=r"input-000007\.json was lost 3 times.* the input is web/x\.tar"):
        ShardExecutor(processes=2).run(methodcaller("die"), [task, task])
    (tmp_path / "a.tar").write_bytes(WHOLE)
    monkeypatch.setattr("fewstep.data.filter_inputs.decoded", lambda data: bytearray(1 << 60))
    with pytest.raises(MemoryError, match=r"too little memory to read .*a\.tar"):
        prepared(tmp_path, tmp_path / "a.tar")


def test_a_folder_of_an_older_fewstep_is_still_read(tmp_path):
    """Its manifest knows nothing of members; but it was made by other rules, so it is not gone on with."""
    (tmp_path / "a.tar").write_bytes(WHOLE)
    prepared(tmp_path, tmp_path / "a.tar")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["members"], manifest["made_with"]["rules"], manifest["inputs"][0]["members"]
    path.write_text(json.dumps(manifest))
    assert len(open_shards(tmp_path / "out")) == 3
    with pytest.raises(InputError, match="begun with other versions"):
        prepared(tmp_path, tmp_path / "a.tar")


def test_a_table_is_matched_by_whole_names_first(tmp_path):
    """`x/1` and `y/1` are two keys; a row for `1` is for neither of them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"key": "x/1", "caption": "red"}, {"key": "2", "caption": "blue"}, {"key": "1", "caption": "wrong"}]
    rows += [{"key": "3", "caption": "one"}, {"key": "3", "caption": "another"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    members = [("x/1.png", RED), ("y/1.png", GREEN), ("y/2.png", BLUE), ("3.png", GREEN)]
    (tmp_path / "a.tar").write_bytes(tar(*members))
    found, _, damage = read(tmp_path / "a.tar")
    assert told(found) == [R, ("green", None, None), B, ("green", None, None)]
    assert "says different things of 1 keys, '3' among them" in damage
    parquet.write_table(pyarrow.Table.from_pylist([{"key": "0001", "caption": "x"}]), tmp_path / "a.parquet")
    assert "in which none of its keys is found" in read(tmp_path / "a.tar")[2]


def test_captions_that_a_table_has_as_bytes_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"image": RED, "caption": b"\xef\xbb\xbfred"}, {"image": BLUE, "caption": "caf\xe9".encode("latin-1")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert told(read(tmp_path / "a.parquet")[0]) == [R, ("blue", "caf\xe9", None)]
