"""`fewstep bench` as a user meets it: what it measures and how it says so, never how fast."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.evaluate.speed import prompt


@pytest.fixture
def bench(capsys: Any) -> Any:
    """Runs `fewstep bench` in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["bench", *(str(argument) for argument in arguments)])
        return (code, *capsys.readouterr())

    return run


def test_the_embedded_model_is_measured_without_more_words(bench):
    code, out, err = bench("--runs", 1, "--steps", 1, "--size", 64)
    assert code == 0, err
    for label in ("model", "machine", "to load", "commit", "first image", "next images", "stages", "peak memory"):
        assert f"\n{label} " in f"\n{out}"
    assert "blocks-turbo, 64x64, 1 step\n" in out


def test_programs_get_all_of_it(bench):
    code, out, err = bench("--json", "--runs", 2, "--steps", 2, "--size", "64x128", "--threads", 1)
    assert code == 0, err
    found = json.loads(out)
    assert (found["width"], found["height"], found["steps"], found["runs"]) == (64, 128, 2, 2)
    assert found["threads"] == 1
    assert found["fastest_seconds"] <= found["picture_seconds"] <= found["slowest_seconds"]
    assert found["first_picture_seconds"] > found["load_seconds"] > 0
    assert found["stage_seconds"].keys() == {"text", "encode", "denoise", "decode"}
    assert found["hardware"]


def test_no_two_pictures_have_the_same_prompt():
    assert len({prompt(number) for number in range(1001)}) == 1001


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--size", "63"], ["--size", "large"], ["--steps", "0"]])
def test_what_cannot_be_measured_is_said_in_one_line(bench, arguments):
    code, out, err = bench(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_unknown_model_is_named(bench):
    code, _, err = bench("--model", "blocks-turbp")
    assert code == 2
    assert "blocks-turbo" in err
