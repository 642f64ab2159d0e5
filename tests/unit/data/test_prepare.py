"""From collections to shards: every picture is accounted for, and the bytes do not depend on who did the work."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from io import BytesIO
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fewstep import files
from fewstep.data.executor import ShardExecutor
from fewstep.data.filter_inputs import Settings
from fewstep.data.filters import Filter, Reason
from fewstep.data.prepare import prepare
from fewstep.data.sources import DamageError, input_files, samples
from fewstep.errors import InputError
from fewstep.formats.tar_writer import TarWriter

SETTINGS = Settings(filter=Filter(min_size=64), side=64, step=16, per_shard=8)
GOOD = {"caption": "a picture", "AESTHETIC_SCORE": 6.0, "pwatermark": 0.1, "punsafe": 0.0}


def picture(seed: int, width: int = 80, height: int = 80, kind: str = "JPEG") -> bytes:
    """A file that neither equals nor looks like that of another seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    data = BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(data, kind)
    return data.getvalue()


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    file = BytesIO()
    tar = TarWriter(file)
    for name, data in members:
        tar.add(name, data)
    tar.end()
    return file.getvalue()


def sample(key: object, image: bytes, **columns: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.json", json.dumps({**GOOD, **columns}).encode())]


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Five tars: four good pictures of two shapes, one of a low score, and a copy of one in another tar."""
    folder = tmp_path / "collection"
    folder.mkdir()
    for number in range(5):
        seeds = range(number * 4, number * 4 + 4)
        members = [m for s in seeds for m in sample(s, picture(s, width=80 if s % 3 else 128))]
        members += sample("poor", picture(100 + number), AESTHETIC_SCORE=4.0)
        members += sample("copy", picture((number * 4 + 6) % 20, width=128 if (number * 4 + 6) % 20 % 3 == 0 else 80))
        (folder / f"{number}.tar").write_bytes(tar_bytes(*members))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_account_adds_up(collection, tmp_path):
    manifest = prepare([collection], tmp_path / "out", SETTINGS)
    assert manifest.samples == 30 == manifest.accepted + sum(manifest.rejected.values())
    assert {reason: count for reason, count in manifest.rejected.items() if count} == {
        "low_aesthetic": 5,
        "duplicate": 5,
    }
    assert manifest.rejected.keys() == {reason.value for reason in Reason}
    assert [each["samples"] for each in manifest.inputs] == [6] * 5
    assert sum(bucket["samples"] for bucket in manifest.buckets) == sum(s["samples"] for s in manifest.shards) == 20
    rows = (tmp_path / "out" / "rejected.csv").read_text().splitlines()
    assert len(rows) == 11
    assert f"{collection}/0.tar,poor,low_aesthetic" in rows


def test_shards_are_tars_that_others_read(collection, tmp_path):
    manifest = prepare([collection], tmp_path / "out", SETTINGS)
    for shard in manifest.shards:
        path = tmp_path / "out" / "shards" / shard["name"]
        assert sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        found = list(samples(path))
        assert len(found) == shard["samples"] <= 8
        width, height = map(int, path.name.partition("-")[0].split("x"))
        for each in found:
            assert Image.open(BytesIO(each.picture)).size == (width, height)
            assert (each.record.caption, each.record.aesthetic) == ("a picture", 6.0)
        with tarfile.open(path) as tar:
            assert {name.partition(".")[2] for name in tar.getnames()} == {"jpg", "json", "txt"}


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(collection, tmp_path, processes):
    prepare([collection], tmp_path / "one", SETTINGS)
    prepare([collection], tmp_path / "more", SETTINGS, ShardExecutor(processes=processes))
    assert contents(tmp_path / "more") == contents(tmp_path / "one")


KILLED = """
import os, signal, sys
from fewstep.data.executor import ShardExecutor
from fewstep.data.filters import Filter
from fewstep.data.prepare import prepare
from fewstep.data.filter_inputs import Settings

def kill(done, total):
    if (total == 5) == (sys.argv[3] == "sifting") and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    settings = Settings(filter=Filter(min_size=64), side=64, step=16, per_shard=8)
    prepare([sys.argv[1]], sys.argv[2], settings, ShardExecutor(progress=kill))
"""


@pytest.mark.parametrize("when", ["sifting", "packing"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(collection, tmp_path, when):
    prepare([collection], tmp_path / "whole", SETTINGS)
    killed = subprocess.run([sys.executable, "-c", KILLED, collection, tmp_path / "out", when], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    work = tmp_path / "out" / ".work"
    done = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    (work / ".input.json.0.partial").write_bytes(b"half")
    prepare([collection], tmp_path / "out", SETTINGS, ShardExecutor(progress=lambda done_now, total: kept(done)))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def kept(done: dict[Path, int]) -> None:
    """What a killed run had finished is not done again."""
    assert done
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


def test_a_worker_that_is_killed_is_replaced(collection, tmp_path):
    killed = []

    def kill_one(done: int, total: int) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    prepare([collection], tmp_path / "out", SETTINGS, ShardExecutor(processes=2, progress=kill_one))
    prepare([collection], tmp_path / "whole", SETTINGS)
    assert killed
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_work_that_kills_every_worker_is_given_up_by_name(tmp_path):
    task = SimpleNamespace(output=tmp_path / "input-000007.json", die=partial(os._exit, 9))
    fine = SimpleNamespace(output=tmp_path / "fine", die=(tmp_path / "fine").touch)
    with pytest.raises(ChildProcessError, match=r"input-000007\.json was lost 3 times"):
        ShardExecutor(processes=2).run(methodcaller("die"), [task, fine])
    assert (tmp_path / "fine").exists()


def test_the_first_of_lookalikes_stays_whatever_the_order_of_work(tmp_path):
    first, again = picture(7), picture(7, kind="PNG")
    (tmp_path / "a.tar").write_bytes(tar_bytes(*sample("one", first), *sample("two", again)))
    (tmp_path / "b.tar").write_bytes(tar_bytes(*sample("three", again), *sample("four", first)))
    for order, names in ((["a", "b"], ["two", "three", "four"]), (["b", "a"], ["four", "one", "two"])):
        out = tmp_path / "".join(order)
        manifest = prepare([tmp_path / f"{name}.tar" for name in order], out, SETTINGS, ShardExecutor(processes=2))
        assert manifest.accepted == 1
        rejected = [row.split(",")[1] for row in (out / "rejected.csv").read_text().splitlines()[1:]]
        assert sorted(rejected) == sorted(names)


def test_a_finished_folder_is_only_read(collection, tmp_path):
    first = prepare([collection], tmp_path / "out", SETTINGS)
    before = contents(tmp_path / "out")
    assert prepare([collection], tmp_path / "out", SETTINGS) == first
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", [{"side": 96}, {"filter": Filter(min_size=65)}, {"max_hamming": None}], ids=str)
def test_a_folder_of_other_settings_is_refused(collection, tmp_path, change):
    prepare([collection], tmp_path / "out", SETTINGS)
    with pytest.raises(InputError, match="begun with other settings"):
        prepare([collection], tmp_path / "out", replace(SETTINGS, **change))
    with pytest.raises(InputError, match="begun with other inputs"):
        prepare([collection / "0.tar"], tmp_path / "out", SETTINGS)


def test_a_folder_with_something_else_in_it_is_refused(collection, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        prepare([collection], tmp_path / "out", SETTINGS)


def test_a_full_disk_leaves_no_half_shard_and_the_run_goes_on(collection, tmp_path, monkeypatch):
    prepare([collection], tmp_path / "whole", SETTINGS)
    synced, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 13:  # the plan, two files for each input, then one of the shards
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match=r"the disk is full while .*\.tar is written.*same command"):
            prepare([collection], tmp_path / "out", SETTINGS)
    whole = contents(tmp_path / "whole")
    shards = contents(tmp_path / "out" / "shards")
    assert shards
    assert all(whole[f"shards/{name}"] == digest for name, digest in shards.items())
    prepare([collection], tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == whole


# name: the tar, its samples, what their reasons are, what is said of its damage
SOUND = tar_bytes(*sample("a", picture(1)), *sample("b", picture(2)))
TARS: dict[str, tuple[bytes, int, dict[str, int], str | None]] = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", 0, {}, "is not a tar file"),
    "web page": (b"<!doctype html>" + bytes(1000), 0, {}, "is not a tar file"),
    "empty file": (b"", 0, {}, "is not a tar file"),
    "empty tar": (tar_bytes(), 0, {}, None),
    "no end": (SOUND[:-1024], 2, {}, None),
    "cut in a picture": (SOUND[: len(SOUND) // 2 + 600], 2, {"cut_short": 1}, "ends within"),
    "cut in a header": (SOUND[: SOUND.index(b"b.jpg") + 99], 1, {}, "cannot be read after byte|no readable header"),
    "garbage": (SOUND[: SOUND.index(b"b.jpg")] + b"\xff" * 2048, 1, {}, "no readable header"),
    "only words": (tar_bytes(("a.txt", b"a cube")), 1, {"missing_aesthetic": 1}, None),
    "no picture": (tar_bytes(*sample("a", b"")[1:]), 1, {"no_picture": 1}, None),
    "bad JSON": (tar_bytes(("a.jpg", picture(1)), ("a.json", b'{"caption": ')), 1, {"damaged_metadata": 1}, None),
    "JSON list": (tar_bytes(("a.jpg", picture(1)), ("a.json", b"[1]")), 1, {"damaged_metadata": 1}, None),
    "page as jpg": (tar_bytes(*sample("a", b"<html>404</html>")), 1, {"not_a_picture": 1}, None),
    "half a jpg": (tar_bytes(*sample("a", picture(1)[:500])), 1, {"damaged_picture": 1}, None),
    "smaller than said": (tar_bytes(*sample("a", picture(1, 40, 40), WIDTH=800)), 1, {"too_small": 1}, None),
    "said to be small": (tar_bytes(*sample("a", b"not looked at", WIDTH=40)), 1, {"too_small": 1}, None),
    "other files": (tar_bytes(("README.md", b"hi"), *sample("a", picture(1)), ("x/", b"")), 1, {}, None),
}


@pytest.mark.parametrize("name", TARS)
def test_damage_is_counted_and_skipped(name, tmp_path):
    data, count, reasons, damage = TARS[name]
    (tmp_path / "0.tar").write_bytes(data)
    (tmp_path / "1.tar").write_bytes(tar_bytes(*sample("good", picture(9))))
    manifest = prepare([tmp_path / "0.tar", tmp_path / "1.tar"], tmp_path / "out", SETTINGS)
    assert manifest.inputs[0]["samples"] == count
    assert {reason: n for reason, n in manifest.rejected.items() if n} == reasons
    assert manifest.accepted == count - sum(reasons.values()) + 1, "what comes after it is read"
    assert manifest.samples == manifest.accepted + sum(manifest.rejected.values())
    told = manifest.inputs[0]["damage"]
    assert told is None if damage is None else any(part in told for part in damage.split("|"))


def test_a_blocklist_knows_a_file_by_its_checksum(tmp_path):
    members = [*sample("bad", picture(1)), *sample("b", picture(2), md5="F00"), *sample("good", picture(3))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members))
    blocked = frozenset({sha256(picture(1)).hexdigest(), "f00"})
    settings = replace(SETTINGS, filter=Filter(min_size=64, blocked=blocked))
    assert prepare([tmp_path], tmp_path / "out", settings).rejected["blocked"] == 2


def test_inputs_that_are_not_there_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").touch()
    for given, message in (("none", "no file or folder"), ("empty", "holds no .tar"), ("a.zip", "neither")):
        with pytest.raises(InputError, match=message):
            prepare([tmp_path / given], tmp_path / "out")
    (tmp_path / "a.tar").touch()
    with pytest.raises(InputError, match="given twice"):
        input_files([tmp_path / "a.tar", tmp_path])


def test_engines_and_numbers_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="did you mean 'local'"):
        ShardExecutor(engine="locl")
    with pytest.raises(InputError, match="processes is 0"):
        ShardExecutor(processes=0)
    with pytest.raises(InputError, match="no min_size to take it from"):
        Settings(filter=Filter(min_size=None))


Rows = list[dict[str, object]]
Table = Callable[[Path, Rows], None]


@pytest.fixture
def table() -> Table:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    return lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_table_of_pictures_is_an_input(table, tmp_path):
    rows = [{"image": {"bytes": picture(i), "path": None}, **GOOD} for i in range(3)]
    table(tmp_path / "a.parquet", [*rows, {"image": None, **GOOD}, {"image": rows[0]["image"]}])
    manifest = prepare([tmp_path], tmp_path / "out", SETTINGS)
    assert (manifest.samples, manifest.accepted) == (5, 3)
    assert (manifest.rejected["no_picture"], manifest.rejected["no_caption"]) == (1, 1)


def test_the_table_beside_a_tar_says_what_its_members_do_not(table, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(("01.jpg", picture(1)), ("01.txt", b"mine"), ("02.jpg", picture(2))))
    table(tmp_path / "a.parquet", [{"key": "01", **GOOD}, {"key": "02", **GOOD, "pwatermark": 0.9}])
    manifest = prepare([tmp_path], tmp_path / "out", SETTINGS)
    assert (manifest.samples, manifest.accepted, manifest.rejected["watermark"]) == (2, 1, 1)
    assert next(samples(tmp_path / "out" / "shards" / manifest.shards[0]["name"])).record.caption == "mine"


def test_a_damaged_table_is_told_and_its_tar_still_read(table, tmp_path):
    (tmp_path / "a.tar").write_bytes(SOUND)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    manifest = prepare([tmp_path], tmp_path / "out", SETTINGS)
    assert manifest.accepted == 2
    assert "a.parquet is not a readable parquet file" in manifest.inputs[0]["damage"]
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(DamageError):
        list(samples(tmp_path / "b.parquet"))


RAY = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from fewstep.data.executor import ShardExecutor
from fewstep.data.filters import Filter
from fewstep.data.prepare import prepare
from fewstep.data.filter_inputs import Settings

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    assert ray.cluster_resources()["CPU"] == 2
    nodes = [second]

    def kill(done, total):
        if done == 2 and nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    settings = Settings(filter=Filter(min_size=64), side=64, step=16, per_shard=8)
    prepare([sys.argv[1]], sys.argv[2], settings, ShardExecutor(engine="ray", progress=kill))
    assert not nodes, "the node was to be killed in the middle"
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_writes_the_same_bytes(collection, tmp_path):
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'fewstep[ray]'")
    prepare([collection], tmp_path / "one", SETTINGS)
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([sys.executable, "-c", RAY, collection, tmp_path / "ray"], check=True, env=environment)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
