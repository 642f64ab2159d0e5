"""Folders that are replaced at once: a kill at any moment leaves a whole one under the name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fewstep import files


def filled(folder: Path, text: str) -> None:
    """Two files that belong together, one of them in a folder."""
    with files.partial_folder(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "first").write_text(text)
        (partial / "inner" / "second").write_text(text)


def text_of(folder: Path) -> str:
    """What both files say; fails where one is missing or they differ."""
    first, second = (folder / "first").read_text(), (folder / "inner" / "second").read_text()
    assert first == second
    return first


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    return request.param


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


CALLS = ((os, "rename"), (os, "replace"), (os, "mkdir"), (os, "fsync"), (os, "rmdir"), (os, "unlink"), (os, "open"))


def killed_at(number: int, task: Callable[[], None]) -> bool:
    """Run `task` in a process of its own that is killed before its `number`-th change of the disk; whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def run(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return run

        for module, name in CALLS:
            setattr(module, name, counted(getattr(module, name)))
        files._exchanged = counted(files._exchanged)  # type: ignore[assignment]
        try:
            task()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_moment_leaves_a_whole_folder_under_the_name(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "model"
    filled(folder, "old")
    number, seen = 1, set()
    while killed_at(number, lambda: filled(folder, "new")):
        assert folder.is_dir() or way == "two renames"
        files.recover_folder(folder)
        seen.add(text_of(folder))
        filled(folder, "old")
        assert names_in(tmp_path) == ["model"], "what the killed process left was swept"
        number += 1
    assert number > 10
    assert seen == {"old", "new"}
    assert text_of(folder) == "new"


def test_an_error_at_any_call_leaves_a_whole_folder_and_nothing_beside_it(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    filled(folder, "old")
    for name in ("rename", "fsync"):
        for number in range(1, 9):
            with monkeypatch.context() as patch:
                calls, call = iter(range(1, 100)), getattr(os, name)

                def failing(*arguments: object, calls=calls, call=call, number=number) -> object:  # type: ignore[no-untyped-def]
                    if next(calls) == number:
                        raise OSError(5, "the disk is gone")
                    return call(*arguments)

                patch.setattr(os, name, failing)
                try:
                    filled(folder, "new")
                except OSError:
                    assert text_of(folder) == "old"
            assert text_of(folder) in {"old", "new"}
            assert names_in(tmp_path) == ["model"]
            filled(folder, "old")


def test_only_what_a_dead_process_of_this_name_left_is_swept(tmp_path: Path) -> None:
    dead = dead_process()
    names = {
        f".model.{dead}.partial": False,
        f".model.{dead}.0123abcd.partial": False,
        f".model.{os.getppid()}.partial": True,  # it lives
        f".other.{dead}.partial": True,  # nobody writes that name now; another machine may
        f".model.{dead}.txt": True,
        f"model.{dead}.partial": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f".long-ago.{dead}.partial").write_text("")
    os.utime(tmp_path / f".long-ago.{dead}.partial", (0, 0))
    filled(tmp_path / "model", "new")
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert not (tmp_path / f".long-ago.{dead}.partial").exists()


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    filled(tmp_path / "there" / "model", "old")
    (tmp_path / "here").symlink_to(tmp_path / "there" / "model")
    filled(tmp_path / "here", "new")
    assert (tmp_path / "here").is_symlink()
    assert text_of(tmp_path / "there" / "model") == "new"
    assert names_in(tmp_path / "there") == ["model"]


def test_a_folder_that_was_moved_aside_is_brought_back_only_where_nothing_is(tmp_path: Path) -> None:
    filled(tmp_path / "model", "old")
    aside = tmp_path / f".model.{dead_process()}.old"
    shutil.copytree(tmp_path / "model", aside)
    files.recover_folder(tmp_path / "model")
    assert aside.exists()
    shutil.rmtree(tmp_path / "model")
    files.recover_folder(tmp_path / "model")
    assert text_of(tmp_path / "model") == "old"
