"""The folder of compiled kernels and autotuning results is the user's own, or it is not used."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep.engines import autotune
from fewstep.engines.autotune import Autotuner
from fewstep.engines.cpu import build
from fewstep.engines.folder import cache_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files here")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where XDG_CACHE_HOME points to, as a real path without links."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return tmp_path.resolve() / "home"


@pytest.fixture
def careless() -> Iterator[None]:
    """What this process makes, everybody may write to, unless it says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("careless")
def test_it_is_made_for_the_user_alone_and_so_are_the_folders_above_it(home: Path) -> None:
    folder = home / "cache" / "fewstep"
    assert cache_folder() == folder
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent, home)} == {0o700}
    assert cache_folder() == folder


@pytest.mark.parametrize(
    ("mode", "level", "used"),
    [
        (0o755, 0, True),
        (0o777, 0, False),
        (0o1777, 0, False),  # who can make files in it can make a library
        (0o777, 1, False),  # who can write to the folder above can put another in its place
        (0o777, 2, False),
        (0o1777, 1, True),  # as in /tmp
        (0o755, 2, True),
    ],
)
def test_who_else_can_write_to_it_or_above_it(home: Path, mode: int, level: int, used: bool) -> None:
    folder = cache_folder()
    assert folder is not None
    (folder, *folder.parents)[level].chmod(mode)
    assert cache_folder() == (folder if used else None)


@pytest.mark.parametrize("above", [False, True])
def test_a_group_that_can_write_counts_unless_it_is_the_users_alone(home: Path, above: bool) -> None:
    folder = cache_folder()
    assert folder is not None
    target = folder.parent if above else folder
    if os.geteuid() == 0:
        os.chown(target, 0, 1234)
    target.chmod(0o775)
    alone = target.stat().st_gid == os.geteuid() != 0
    assert cache_folder() == (folder if alone else None)


def test_a_folder_or_a_link_of_another_user(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = cache_folder()
    assert folder is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert cache_folder() is None
    if os.geteuid() == 0:
        for target in (folder, folder.parent):
            os.chown(target, 1234, 1234)
            assert cache_folder() is None
            os.chown(target, 0, 0)
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
        assert cache_folder() == tmp_path.resolve() / "moved"  # a link of the user's own
        os.chown(folder, 1234, 1234, follow_symlinks=False)
        assert cache_folder() is None


@pytest.mark.parametrize("made", ["file", "dangling", "circle", "pipe"])
def test_something_else_in_its_place(home: Path, made: str) -> None:
    (home / "cache").mkdir(parents=True, mode=0o700)
    folder = home / "cache" / "fewstep"
    match made:
        case "file":
            folder.write_text("")
        case "dangling":
            folder.symlink_to(home / "nowhere" / "at all")
        case "circle":
            folder.symlink_to(folder)
        case "pipe":
            os.mkfifo(folder)
    assert cache_folder() is None


def test_a_place_that_is_no_folder_or_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() is None
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for name in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", name)
        assert cache_folder() == tmp_path.resolve() / "me" / ".cache" / "fewstep"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder() == tmp_path.resolve() / "fewstep-cache"


def test_without_it_choices_are_forgotten_and_kernels_are_built_for_the_process_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache_folder()
    assert folder is not None
    monkeypatch.setattr(autotune, "digest", lambda *_: "known")
    (folder / "cpu-known.json").write_text('{"key": "two"}')
    made = autotune.cpu_autotuner.__wrapped__
    assert made(1).known == {"key": "two"}
    folder.chmod(0o777)
    with caplog.at_level(logging.DEBUG):
        assert (made(1).known, made(1).path) == ({}, None)
        assert build._temporary_folder() != folder
    assert f"{folder} is not used: other users can write to {folder}" in caplog.text
    assert stat.S_IMODE(build._temporary_folder().stat().st_mode) == 0o700


def test_two_processes_keep_the_choices_of_both(tmp_path: Path) -> None:
    candidates = {name: lambda: torch.ones(1) for name in ("one", "two")}
    first, second = Autotuner(tmp_path / "cpu.json"), Autotuner(tmp_path / "cpu.json")
    for autotuner, key in ((first, "a"), (second, "b")):
        autotuner.run(key, candidates)
    kept = json.loads((tmp_path / "cpu.json").read_text())
    assert kept == {"a": first.known["a"], "b": second.known["b"]}
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_half_a_character_in_a_file_of_choices_is_no_reason_to_stop(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text('{"\\ud800": "one"}')
    assert Autotuner(path).run("a", {name: lambda: torch.ones(1) for name in ("one", "two")}) == 1
