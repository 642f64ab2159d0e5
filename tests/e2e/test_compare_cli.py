"""`fewstep compare`, `card` and `emissions` as a user meets them, with the embedded model."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fewstep
from fewstep.cards.training_record import DataSource, TrainingRecord, TrainingStage
from fewstep.cli import main
from fewstep.compare.study import read_study
from fewstep.compare.votes import QUESTIONS, RaterVotes, Vote

ONE, TWO = "blocks-base:steps=1,width=64,height=64", "blocks-base:steps=2,width=64,height=64"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: Any, tmp_path: Path, monkeypatch: Any) -> Cli:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


def test_from_models_to_charts_of_people_s_votes_and_of_a_model_s(cli):
    pytest.importorskip("matplotlib")
    Path("prompts.txt").write_text("a red cube\n\n  a  small blue sphere\na green cone\n", encoding="utf-8")
    made = cli(
        "compare", ONE, TWO, "--prompts", "prompts.txt", "--count", 2, "--seed", 3, "--out", "page", "--judge", "reader"
    )
    assert made.code == 0, made.err
    paths = [Path(line) for line in made.out.splitlines()]
    assert paths[0] == Path("page/index.html")
    assert [path.name for path in paths[1:]] == [f"preference-judged-by-model.{kind}" for kind in ("svg", "png", "csv")]
    assert all(path.is_file() for path in paths)
    assert "Judged by model: algorithmic reader" in made.err

    study = read_study(Path("page"))
    assert {pair.prompt for pair in study.pairs} == {"a red cube", "a small blue sphere"}
    assert [model["steps"] for model in study.models.values()] == [1, 2]
    assert sum(pair.is_check for pair in study.pairs) == 1
    votes = tuple(
        Vote(pair.id, "quality", str(1 + pair.drawn_by.index(TWO))) for pair in study.pairs if not pair.is_check
    )
    Path("anna.json").write_text(RaterVotes(study=study.digest, rater="anna", votes=votes).to_json(), encoding="utf-8")
    counted = cli("compare", "--tally", "page", "anna.json")
    assert counted.code == 0, counted.err
    assert f"quality: {ONE} over {TWO} in 0.000 (95 % interval 0.000 to 0.658) of 2 votes" in counted.err
    with Path("page/preference.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["voted"], row["for_second"], row["raters"]) == ("people", "2", "1")
    assert set(QUESTIONS) > {row["question"]}

    twice = cli("compare", "--tally", "page", "anna.json", "anna.json")
    assert (twice.code, "votes 2 times" in twice.err) == (2, True)
    mixed = cli("compare", "--tally", "page", "anna.json", "--judge", "reader")
    assert (mixed.code, "cannot be counted together" in mixed.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blocks-base", "--out", "new"], "name two or more"),
        (["blocks-base", "blocks-base", "--out", "new"], "would be called 'blocks-base'"),
        (["blocks-base", "blocks-base:stpes=2", "--out", "new"], "did you mean 'steps'"),
        (["blocks-base", "blocks-base:steps=two", "--out", "new"], "steps 'two' is not a number"),
        (["blocks-base", "blocks-base:steps=2"], "no --out"),
        (["blocks-base", "blocks-base:steps=2", "--out", "full"], "not empty"),
        (["blocks-base", "blocks-base:steps=2", "--out", "new", "--judge", "raeder"], "did you mean 'reader'"),
        (["blocks-base", "blocks-base:steps=2", "--out", "new", "--prompts", "none.txt"], "'none.txt' cannot be read"),
        (["blocks-base", "blocks-base:steps=2", "--out", "new", "--prompts", "empty.txt"], "holds no prompt"),
        (["--tally", "full"], "has no key.json"),
        (["--tally", "full", "--out", "new"], "leave out --out"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_drawn(cli, arguments, message):
    Path("full").mkdir()
    Path("full/file").touch()
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    outcome = cli("compare", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not Path("new").exists()


def test_a_card_is_written_beside_the_weights_and_keeps_what_people_wrote(cli):
    shutil.copytree(Path(fewstep.__file__).parent / "assets" / "blocks-base", "model")
    Path("model/training.json").unlink()
    hand = "# blocks\n\nWritten by hand."
    Path("model/README.md").write_text(hand, encoding="utf-8")
    without = cli("card", "model")
    assert (without.code, "has no training.json" in without.err) == (2, True)
    stage = TrainingStage(
        name="unet", steps=10, batch=8, precision="float32", hours=2, watts=50, hardware="CPU", settings={}
    )
    training = TrainingRecord(
        name="blocks", summary="Small.", example="a red cube", licence="Apache-2.0", stages=(stage,), kg_per_kwh=0.3,
        data=(DataSource(what="own pictures", digest="1"),), limits=("Few words.",),
    )  # fmt: skip
    Path("model/training.json").write_text(training.to_json(), encoding="utf-8")
    Path("scores.json").write_text(json.dumps([{"what": "exact", "value": 0.9, "how": "reader"}]), encoding="utf-8")
    written = cli("card", "model", "--scores", "scores.json")
    assert (written.code, written.out.strip()) == (0, "model/README.md")
    card = Path("model/README.md").read_text(encoding="utf-8")
    assert hand in card
    for text in ("| unet | 6,", "0.03 kg CO2 equivalent", "| exact | 0.900 |", "license: apache-2.0"):
        assert text in card
    assert cli("card", "model", "--scores", "scores.json").code == 0
    assert Path("model/README.md").read_text(encoding="utf-8") == card


def test_emissions_of_the_card_of_stable_diffusion_v1_4(cli):
    outcome = cli("emissions", 150_000, "--watts", 250, "--kg-per-kwh", 0.3)
    assert outcome.out == "11,250 kg CO2 equivalent = 150,000 h x 250 W (assumed) x 0.3 kg/kWh x PUE 1\n"
    assert cli("emissions", 1, "--watts", -1, "--kg-per-kwh", 0.3).code == 2
