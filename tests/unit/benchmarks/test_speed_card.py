"""The suite for a card, on a CPU and with small models: which rows, what stands in its file, what is ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.speed import fewstep_runner, gpu_suite, isolated, results_file, waterfall
from benchmarks.speed.diffusers_runner import module
from benchmarks.speed.gpu_suite import FIRST, Row
from benchmarks.speed.isolated import CaseResult, measure_case, measure_isolated
from benchmarks.speed.machine import flops
from benchmarks.speed.models import _save_model, _save_tiny, random_loaded, random_loaded_of
from benchmarks.speed.options import BenchmarkOptions
from benchmarks.speed.runners import CUDA, Runner, select_runners, version_of
from benchmarks.speed.tasks import Piece, Task, inputs

from fewstep.models import zoo
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.weights.load import load_model, load_tiny
from tests.unit.benchmarks import speed_fakes

LEVELS = (Stage(channels=32, resnets=1, depth=1, heads=2), Stage(channels=32, resnets=1))
TEXT = TextConfig(vocabulary=10, width=32, layers=2, heads=2, inner=32, eos=2)
TURBO = Row(model="little-turbo", size=64, must=1e6, aim=1e-6)
XL = Row(model="little-xl", size=64, steps=2, must=1e-9, aim=1e-9, unit="s")
BY_NAME = {each.name: each for each in CUDA}


def little(name: str, like: str, unet: UNetConfig, *texts: TextConfig) -> zoo.Entry:
    known = zoo.entry(like)
    assert known.defaults is not None
    shape = AutoencoderConfig(channels=(32, 32, 32, 32), resnets=1)
    defaults = replace(known.defaults, width=64, height=64)
    return replace(known, name=name, unet=unet, autoencoder=shape, texts=texts, defaults=defaults)


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two little models, of one text tower and of two."""
    xl = UNetConfig(stages=LEVELS, context=64, linear_projection=True, addition=32 + 6 * 256)
    for known in (
        little("little-turbo", "sd-turbo", UNetConfig(stages=LEVELS, context=32), TEXT),
        little("little-xl", "sdxl-base", xl, TEXT, replace(TEXT, projection=32)),
    ):
        monkeypatch.setitem(zoo.CATALOGUE, known.name, known)
        monkeypatch.setitem(zoo._SPELLINGS, zoo._key(known.name), known.name)
    monkeypatch.setattr(isolated, "RUNS", 2)
    monkeypatch.setattr(isolated, "FEW", 1)
    random_loaded.cache_clear()
    yield
    random_loaded.cache_clear()


@pytest.fixture
def options_here(tmp_path: Path) -> BenchmarkOptions:
    return BenchmarkOptions(hardware="box", results=tmp_path, cache=tmp_path / "cache", peers="fewstep")


def here(cases: Sequence[tuple[Runner, Task]], seconds: float) -> Iterator[CaseResult]:
    """Measures in this process, which knows the little models."""
    return (measure_case(*case) for case in cases)


def drawn(rows: Sequence[Row], options: BenchmarkOptions, monkeypatch: pytest.MonkeyPatch, name: str = "cuda") -> str:
    """The file of a suite of `rows`."""
    monkeypatch.setitem(gpu_suite._SUITES, name, tuple(rows))
    gpu_suite.run_card_suite(name, replace(options, commit="abc1234"), isolated=here, first=here)
    (path,) = options.results.glob(f"speed_{name}-suite_box_*.md")
    return path.read_text(encoding="utf-8")


def cells(text: str) -> list[dict[str, str]]:
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# the rows


def test_the_suite_has_every_target_of_the_table():
    rows = gpu_suite._SUITES["cuda"]
    targets = {(row.model, row.part, row.decoder, row.batch): (row.must, row.aim) for row in rows}
    assert len(targets) == len(rows)
    assert targets["sd-turbo", "whole", "kl", 1] == (8.5, 6.5)
    assert targets["sd-turbo", "whole", "tiny", 1] == (4, 2.5)
    assert targets["sd-turbo", "whole", "tiny", 32] == (400, 600)
    assert targets["sd-turbo", FIRST, "kl", 1] == (6, 4)
    assert targets["sdxl-turbo", "whole", "kl", 1] == (12, 9)
    assert targets["small-sd", "whole", "kl", 1] == (42, 32)
    assert targets["sd-v1-4", "whole", "kl", 1] == (280, 200)
    assert targets["sdxl-base", "whole", "kl", 1] == (1.45, 1.25)


def test_rows_draw_as_their_models_do(options_here):
    titles = {row.title() for row in gpu_suite._SUITES["cuda"]}
    assert "sd-v1-4, whole, 512 px, 50 steps of plms, guided" in titles
    assert "sdxl-base, whole, 1024 px, 50 steps of euler, guided" in titles
    assert "sd-turbo, whole, 512 px, 1 step of euler, tiny decoder, batch 32" in titles
    task = next(row for row in gpu_suite._SUITES["cuda"] if row.model == "small-sd").task(options_here)
    assert (task.steps, task.guidance, task.sampler) == (10, 7.5, "dpmpp_2m")


def test_the_rows_of_a_model_share_a_process_for_each_contender(options_here):
    options = replace(options_here, peers="fewstep+fewstep, plain engine")
    batches = gpu_suite.cases("cuda", options)
    kinds = [{(case.row.model, case.row.part == FIRST, case.runner.name) for case in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert len({next(iter(kind)) for kind in kinds}) == len(kinds)


def test_a_waterfall_is_one_process(options_here):
    (batch,) = gpu_suite.cases("cuda-waterfall", replace(options_here, peers="all"))
    assert [case.runner.name for case in batch][:2] == ["plain engine", "+ huge_pages"]


# models made in place


def test_models_made_in_place_are_the_same_each_time():
    first = random_loaded("little-xl", "cpu", torch.float32)
    random_loaded.cache_clear()
    second = random_loaded("little-xl", "cpu", torch.float32)
    assert first is not second
    for a, b in zip(first.networks, second.networks, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(weight.requires_grad or weight.is_meta for weight in second.networks.unet.parameters())
    assert (second.networks.unet.conv_norm_out.weight != 1).any()


def test_a_folder_has_the_weights_that_are_made_in_place(options_here):
    task = replace(TURBO, decoder="tiny").task(options_here)
    assert task.decoder is not None
    _save_model(task)
    _save_tiny(task)
    read = load_model(task.folder, dtype=torch.float32).with_tiny(load_tiny(task.decoder, dtype=torch.float32))
    made = random_loaded_of(task)
    for name in ("unet", "autoencoder", "tiny"):
        weights, others = (getattr(model.networks, name).state_dict() for model in (made, read))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize(
    ("kind", "decoder"), [("text", "kl"), ("unet", "kl"), ("decode", "kl"), ("decode", "tiny"), ("encode", "kl")]
)
def test_diffusers_networks_are_filled_with_the_same_weights(options_here, kind, decoder):
    task = replace(TURBO, decoder=decoder).task(options_here)
    given = [torch.from_numpy(value) for value in inputs(task, Piece(kind, 1))]
    model = random_loaded_of(task)
    own = {
        "text": lambda ids: model.networks.text_encoders[0](ids).last,
        "unet": model.networks.unet,
        "decode": (model.networks.tiny or model.networks.autoencoder).decode,
        "encode": lambda image: model.networks.autoencoder.encode(image).chunk(2, dim=1)[0],
    }
    with torch.inference_mode():
        torch.testing.assert_close(module(task, Piece(kind, 1))(*given), own[kind](*given), rtol=1e-4, atol=1e-4)


def test_a_row_alone_draws_wholes_of_two_text_towers_by_fewstep(options_here):
    task = replace(XL.task(options_here), images=False)
    names = [each.name for each in select_runners("all", task)]
    assert names == ["fewstep", "fewstep, plain engine", "fewstep, strict"]
    with pytest.raises(SystemExit, match="two text towers"):
        select_runners("diffusers", task)
    made = fewstep_runner.load(task, plain=True)()
    assert made.output.shape == (1, 3, 64, 64)
    assert made.stages.keys() == {"text", "unet", "decode"}
    assert list(flops(task)) == ["text", "unet", "decode"]


def test_fewstep_has_a_version_where_it_is_not_installed(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from fewstep.version import __version__

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("benchmarks.speed.runners.version", absent)
    assert version_of("fewstep") == __version__
    assert BY_NAME["fewstep"].missing() == "pip install fewstep torch"
    with pytest.raises(PackageNotFoundError):
        version_of("torch")


# the whole suite


def test_wholes_of_one_and_of_two_text_towers_beside_their_targets(options_here, monkeypatch):
    rows = [TURBO, replace(TURBO, decoder="tiny", batch=2, unit="pictures/s"), XL]
    text = drawn(rows, options_here, monkeypatch)
    one, many, xl = cells(text)
    assert one["row"] == "little-turbo, whole, 64 px, 1 step of euler"
    assert one["must / aim"] == "1e+06 / 1e-06"
    assert one["reached"] == "must"
    assert many["median"].endswith(" pictures/s")
    assert xl["median"].endswith(" s")
    assert xl["reached"].startswith("no, x ")
    assert "commit abc1234" in text
    assert "torch " in text
    assert "not run" not in text


def test_peers_stand_below_fewstep_with_its_ratio_and_errors(options_here, monkeypatch):
    options = replace(options_here, peers="fewstep+diffusers, float32+tensorrt")
    text = drawn([replace(TURBO, part="unet"), TURBO], options, monkeypatch)
    rows = cells(text)
    names = ["fewstep", "diffusers, float32"]
    assert [row["runner"] for row in rows] == [*names, *names]
    assert rows[0]["row"] == rows[1]["row"] == "little-turbo, unet, 64 px"
    assert rows[1]["fewstep is faster by"].startswith("x ")
    assert 0 < float(rows[0]["error"]) < 1e-3
    assert rows[1]["error"] == rows[1]["must / aim"] == ""
    assert "- tensorrt: not run, not installed; `pip install tensorrt onnxscript diffusers`" in text


def test_a_waterfall_says_what_each_optimization_gives(options_here, monkeypatch):
    without = tuple(name for name in waterfall.names("cpu") if name not in ("huge_pages", "kernels"))
    text = drawn([TURBO], replace(options_here, without=without), monkeypatch, "cuda-waterfall")
    rows = cells(text)
    assert [row["runner"] for row in rows] == ["plain engine", "+ huge_pages", "+ kernels"]
    assert rows[0]["gives"] == rows[0]["in all"] == "x 1.00"
    assert "- + kernels: " in text


def test_a_row_that_fails_is_told_and_the_others_are_measured(options_here, monkeypatch):
    strange = replace(TURBO, sampler="no-such-sampler")
    monkeypatch.setitem(gpu_suite._SUITES, "cuda", (strange, TURBO))
    assert gpu_suite.run_card_suite("cuda", options_here, isolated=here, first=here) == 1
    (path,) = options_here.results.glob("*.md")
    text = path.read_text(encoding="utf-8")
    assert len(cells(text)) == 1
    assert "not run. InputError: " in text


def test_the_file_is_there_after_each_row(options_here, monkeypatch):
    monkeypatch.setitem(gpu_suite._SUITES, "cuda", (TURBO, replace(TURBO, part="unet")))
    seen: list[int] = []

    def watched(cases: Sequence[tuple[Runner, Task]], seconds: float) -> Iterator[CaseResult]:
        for _ in cases:
            (path,) = options_here.results.glob("*.md")
            seen.append(len(cells(path.read_text(encoding="utf-8"))))
            yield CaseResult(seconds=(1.0, 2.0, 3.0))

    gpu_suite.run_card_suite("cuda", options_here, isolated=watched, first=watched)
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("unit", "seconds", "expected"),
    [
        ("ms", 0.006, "aim"),
        ("ms", 0.008, "must"),
        ("ms", 0.017, "no, x 2.00"),
        ("pictures/s", 0.1, "aim"),
        ("pictures/s", 0.5, "aim"),
        ("pictures/s", 0.7, "must"),
        ("pictures/s", 2.0, "no, x 2.12"),
    ],
)
def test_targets_are_reached_or_missed_by_a_factor(unit, seconds, expected):
    row = replace(TURBO, batch=8, unit=unit, must=8.5, aim=12.0) if unit != "ms" else replace(TURBO, must=8.5, aim=6.5)
    assert results_file.reached(row, CaseResult(seconds=(seconds,))) == expected


def test_errors_are_shares_of_the_largest_value(options_here):
    unet = replace(TURBO, part="unet")
    page = results_file.ResultsFile.of("cuda", options_here, {})
    page.add(unet, BY_NAME["fewstep"], CaseResult(seconds=(1.0,), output=np.array([1.5, 2.0])))
    page.add(unet, BY_NAME["diffusers"], CaseResult(seconds=(3.0,), output=np.array([1.0, 2.0])))
    mine, other = cells(page.text())
    assert mine["error"] == "2.5e-01"
    assert other["fewstep is faster by"] == "x 3.00"


# processes


def test_after_a_failure_or_an_end_the_rest_is_measured_in_a_new_process():
    runner = Runner(name="fake", load=speed_fakes.load, packages=())
    tasks = [Task(model=model, folder=Path(), made=True) for model in ("runs", "fails", "dies", "runs")]
    found = list(measure_isolated([(runner, task) for task in tasks], 120))
    assert [one.problem for one in found] == [
        None,
        "RuntimeError: no such kernel",
        "its process ended (out of memory?)",
        None,
    ]


def test_what_takes_too_long_is_ended_and_said_to_be():
    runner = Runner(name="fake", load=speed_fakes.load, packages=())
    (found,) = measure_isolated([(runner, Task(model="hangs", folder=Path(), made=True))], 0.5)
    assert found.problem == "no answer in 0.5 s: ended"


def test_a_first_picture_that_fails_is_told():
    task = Task(model="no-such-model", folder=Path(), made=True)
    (found,) = isolated.first_images([(BY_NAME["fewstep"], task)], 120)
    assert found.problem is not None
    assert "no-such-model" in found.problem


def test_a_first_picture_counts_no_making_of_weights(monkeypatch, capsys):
    from benchmarks.speed import first_image

    first_image.main("little-turbo", "cpu", "float32", 64)
    reply = capsys.readouterr().out
    assert '"made": ' in reply

    class Ended:
        returncode, stderr = 0, ""
        stdout = 'warning\n{"drawn": 105.0, "made": 1.0}\n'

    monkeypatch.setattr(isolated.subprocess, "run", lambda *command, **options: Ended)
    monkeypatch.setattr(isolated, "perf_counter", lambda: 100.0)
    (found,) = isolated.first_images([(BY_NAME["fewstep"], Task(model="little-turbo", folder=Path()))], 120)
    assert found.seconds == (4.0, 4.0)
    assert found.loaded == 1.0
