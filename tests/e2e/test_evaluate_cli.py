"""`fewstep evaluate` as a user meets it, with a handful of pictures of the embedded model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from fewstep.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: Any, tmp_path: Path, monkeypatch: Any) -> Cli:
    """Runs `fewstep evaluate` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        code = main(["evaluate", *(str(argument) for argument in arguments)])
        return Outcome(code, *capsys.readouterr())

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_blocks(cli: Cli, tmp_path: Path) -> None:
    arguments = ("blocks", "blocks-base:steps=2", "--base", "blocks-base:steps=1", "--count", 2, "--varied", 1)
    outcome = cli(*arguments, "--training", 20, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    report = tmp_path / outcome.out.strip()
    text, table = report.read_text(), rows(report.with_suffix(".csv"))
    assert {row["model"] for row in table} == {"blocks-base, 1 step", "blocks-base, 2 steps"}
    assert {row["reader"] for row in table} == {"algorithm", "network"}
    assert len(table) == 2 * 2 * 6
    for words in ("second-reader (sha256", "Diversity", "Nearest training images", "Too few images", "Split "):
        assert words in text
    sheets = sorted(path.name for path in report.parent.glob("*.png"))
    own = [f"blocks-base-{s}-{w}.png" for s in ("1-step", "2-steps") for w in ("answers", "neighbours")]
    assert sheets == [*own, "blocks.png"]
    scores = json.loads((report.parent / "blocks-base-2-steps-scores.json").read_text())
    assert {"what", "value", "low", "high", "count", "how"} <= scores[0].keys()
    assert "diversity" in scores[-1]["what"]
    drawn = {path: path.stat().st_mtime_ns for path in report.parent.glob("pictures/*/*.png")}
    assert cli(*arguments, "--training", 20, "--device", "cpu").code == 0
    assert {path: path.stat().st_mtime_ns for path in report.parent.glob("pictures/*/*.png")} == drawn


def test_pareto(cli: Cli, tmp_path: Path) -> None:
    small = ("--count", 10, "--steps", 2, "--size", 64, "--scales", "1.5,4", "--device", "cpu", "-o", "p")
    outcome = cli("pareto", "blocks-base", *small, "--renders", 40)
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "pareto.csv", "pareto.md", "pareto.png", "pareto.svg", "pictures",
    ]  # fmt: skip
    assert [row["guidance"] for row in rows(tmp_path / "p" / "pareto.csv")] == ["1.5", "4.0"]
    text = (tmp_path / "p" / "pareto.md").read_text()
    assert "10 images are few" in text
    assert text.count("block-clip") == 2, "the networks that judged are named"


def test_fid_of_folders(cli: Cli, tmp_path: Path) -> None:
    for name in ("drawn", "real"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (64, 64), (20 * i, 100, 50 if name == "real" else 90)).save(tmp_path / name / f"{i}.png")
    outcome = cli("fid", "drawn", "real")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == str(Path("evaluation") / "fid.md")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fid", "absent", "real"), "there is no folder absent"),
        (("pareto", "--scales", "high"), "'high' are not numbers"),
        (("pareto", "--prompts", "p.txt"), "belong together"),
        (("pareto", "--count", "3"), "greater than or equal to 10"),
        (("blocks", "blocks-bass"), "blocks-base"),
        (("blocks", "--count", "0"), "greater than or equal to 1"),
    ],
)
def test_errors_are_one_line_that_helps(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code in (2, 3)
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
