"""`fewstep batch` as a user meets it: every line once, each picture what it would be alone, on it goes when stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.cli import main
from fewstep.images import read_metadata

LINES = "a red cube\n\na blue sphere\na green cube on top of a white sphere\n"
SMALL = ("--size", "64", "--steps", "1")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_each_line_becomes_the_picture_that_it_is_alone(prompts: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "pictures"
    assert main(["batch", str(prompts), "-o", str(folder), "--batch", "2", "--seed", "7", *SMALL]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["00001.png", "00003.png", "00004.png"]
    out = capsys.readouterr().out
    assert out.split() == [str(folder / f"0000{number}.png") for number in (1, 3, 4)]
    told = read_metadata(folder / "00003.png")
    assert told is not None
    assert (told["prompt"], told["seed"]) == ("a blue sphere", 9)
    assert main(["generate", "a blue sphere", "--seed", "9", "-o", str(tmp_path / "alone.png"), *SMALL]) == 0
    assert np.abs(pixels(folder / "00003.png") - pixels(tmp_path / "alone.png")).max() <= 1


def test_what_is_there_stays(prompts: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "00001.png").write_bytes(b"mine")
    assert main(["batch", str(prompts), "-o", str(folder), *SMALL]) == 0
    assert (folder / "00001.png").read_bytes() == b"mine"
    assert capsys.readouterr().out.split() == [str(folder / f"0000{number}.png") for number in (3, 4)]


def test_processes_share_the_lines(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["batch", str(prompts), "-o", str(tmp_path / rank), *SMALL]) == 0
        drawn.append([Path(path).name for path in capsys.readouterr().out.split()])
    assert drawn == [["00001.png", "00004.png"], ["00003.png"]]


def test_a_file_without_prompts_is_an_error(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    for name, message in (("empty.txt", "holds no prompt"), ("none.txt", "cannot be read as text")):
        assert main(["batch", str(tmp_path / name), "-o", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
