"""`fewstep batch` as a user meets it: every line once, each picture what it would be alone, on it goes when stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
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


@pytest.fixture
def drawn(prompts: Path, tmp_path: Path, capsys: Any) -> Any:
    """`drawn(*options)`: the numbers of the lines that the command drew, and what it said."""

    def run(*options: str, code: int = 0) -> tuple[list[int], str]:
        assert main(["batch", str(prompts), "-o", str(tmp_path / "pictures"), *SMALL, *options]) == code
        out, err = capsys.readouterr()
        return [int(Path(path).stem) for path in out.split()], err

    return run


def test_pictures_that_are_there_stay_if_they_would_be_the_same(drawn: Any, prompts: Path, tmp_path: Path) -> None:
    assert drawn()[0] == [1, 3, 4]
    assert drawn()[0] == []
    (tmp_path / "pictures" / "00003.png").unlink()
    assert drawn()[0] == [3]
    prompts.write_text(LINES.replace("a red cube", "a red sphere"))
    numbers, said = drawn()
    assert numbers == [1]
    assert "1 of the pictures there were drawn from other lines or settings" in said


@pytest.mark.parametrize(
    "change",
    [
        ("--seed", "5"),
        ("--steps", "2"),
        ("--size", "72"),
        ("--sampler", "euler"),
        ("--schedule", "karras"),
        ("--guidance-scale", "2"),
        ("--model", "blocks-base"),
        ("--negative-prompt", "blue"),
        ("--decoder", "tiny"),
        ("--dtype", "float16"),
    ],
)
def test_another_setting_draws_all_anew_and_so_does_its_absence(drawn: Any, change: tuple[str, ...]) -> None:
    drawn()
    assert drawn(*change)[0] == [1, 3, 4]
    assert drawn(*change)[0] == []
    assert drawn()[0] == [1, 3, 4]


def test_what_a_folder_of_weights_draws_by_default_counts_too(drawn: Any, tmp_path: Path) -> None:
    """Its defaults are known when it is loaded, and not before."""
    fewstep.load("blocks-base").save(tmp_path / "mine")
    model = ("--model", str(tmp_path / "mine"))
    for change in (("--guidance-scale", "2"), ("--schedule", "karras"), ("--sampler", "euler")):
        assert drawn(*model, *change)[0] == [1, 3, 4]
        assert drawn(*model, *change)[0] == []
        assert drawn(*model)[0] == [1, 3, 4]
        assert drawn(*model)[0] == []


def test_a_picture_that_was_cut_short_is_drawn_anew(drawn: Any, tmp_path: Path) -> None:
    drawn()
    path = tmp_path / "pictures" / "00003.png"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-60] + b"\0" * 8 + whole[-52:]):
        path.write_bytes(damaged)
        assert drawn()[0] == [3]
        assert path.read_bytes() == whole


def test_a_line_ends_where_an_editor_ends_it(drawn: Any, prompts: Path) -> None:
    """Else the numbers of the pictures are not those of the lines."""
    prompts.write_bytes("a red\x0bcube\ra blue\u2028sphere\r\na green\x85cone\n".encode())
    assert drawn()[0] == [1, 2, 3]


def test_a_line_that_comes_twice_is_drawn_twice(drawn: Any, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("a red cube\na red cube\n")
    assert drawn()[0] == [1, 2]
    assert (pixels(tmp_path / "pictures" / "00001.png") != pixels(tmp_path / "pictures" / "00002.png")).any()


def test_files_of_others_are_not_replaced_unless_they_are_given_up(drawn: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "00001.png")
    (tmp_path / "pictures" / "00003.png").write_bytes(b"mine")
    numbers, said = drawn(code=2)
    assert numbers == []
    assert "not drawn by fewstep" in said
    assert (tmp_path / "pictures" / "00003.png").read_bytes() == b"mine"
    assert drawn("--force")[0] == [1, 3, 4]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_comments_and_line_ends_are_no_prompts(drawn: Any, prompts: Path, tmp_path: Path, encoding: str) -> None:
    prompts.write_bytes("a red cube\r\n# a note\r\n\r\n  a blue sphere  \r\n".encode(encoding))
    assert drawn()[0] == [1, 4]
    made = [read_metadata(tmp_path / "pictures" / f"0000{number}.png") for number in (1, 4)]
    assert [found and found["prompt"] for found in made] == ["a red cube", "a blue sphere"]


def test_unknown_words_are_named_with_their_line(drawn: Any, prompts: Path) -> None:
    prompts.write_text("a red cube\na purple dragon\n")
    said = drawn()[1]
    assert "line 2: words the model does not know: dragon" in said
    assert "line 1" not in said


def test_text_of_another_encoding_is_refused(drawn: Any, prompts: Path) -> None:
    prompts.write_bytes("ein grüner Würfel".encode("latin-1"))
    assert "UTF-8" in drawn(code=2)[1]


def test_processes_share_the_lines(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["batch", str(prompts), "-o", str(tmp_path / rank), *SMALL]) == 0
        drawn.append([Path(path).name for path in capsys.readouterr().out.split()])
    assert drawn == [["00001.png", "00004.png"], ["00003.png"]]


def test_a_process_that_starts_late_draws_its_own_lines(drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the others have drawn by then."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(drawn()[0])
    assert shares == [[1, 4], [3]]


def test_a_file_without_prompts_is_an_error(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    for name, message in (("empty.txt", "holds no prompt"), ("none.txt", "cannot be read as text")):
        assert main(["batch", str(tmp_path / name), "-o", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
