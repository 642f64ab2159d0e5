"""The speed benchmark tells what it measured: the right task, rows and figures. No time is asserted."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.speed import fewstep_runner, report, runners, suite, waterfall
from benchmarks.speed.__main__ import main
from benchmarks.speed.machine import Peaks, flops, hardware_name
from benchmarks.speed.models import noise_levels_of
from benchmarks.speed.options import BenchmarkOptions, command_parser, parse_options
from benchmarks.speed.sampling_loop import run_of, sample, torch_arrays
from benchmarks.speed.sdcpp_runner import stages
from benchmarks.speed.tasks import Piece, RunOutput, Task, inputs, prompt, token_ids
from benchmarks.speed.turns import RunnerResult, measured, shares

from fewstep.diffusion.denoiser import denoiser
from fewstep.diffusion.samplers import SAMPLERS
from fewstep.engines.cpu.optimizations import Optimizations
from fewstep.engines.cuda.optimizations import CudaOptimizations
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Conditioning
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults, entry
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import word_tokenizer
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model
from fewstep.weights.scheduler import SchedulerConfig

WORDS = word_tokenizer(["a"], 77)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    levels = (Stage(channels=32, resnets=1, depth=1, heads=2), Stage(channels=32, resnets=1))
    text = TextConfig(vocabulary=len(WORDS), width=32, layers=1, heads=2, inner=32, eos=WORDS.eos)
    return LoadedModel.of(
        Networks(
            unet=UNet(UNetConfig(stages=levels, context=32)).eval(),
            autoencoder=AutoencoderKL(AutoencoderConfig(channels=(32, 32, 32, 32), resnets=1)).eval(),
            text_encoders=(TextEncoder(text).eval(),),
        ),
        (WORDS,),
        name="tiny",
        family="sd1",
        scheduler=SchedulerConfig(sampler="plms", spacing="leading"),
        defaults=Defaults(guidance_scale=7.5, sampler="plms", width=64, height=64),
        licence="CC0-1.0",
    )


@pytest.fixture(scope="module")
def task(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Two guided images in four steps of DPM-Solver++(2M), by a model of Small-SD's levels."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder)
    levels = noise_levels_of("small-sd", 4, "dpmpp_2m")
    how: dict[str, Any] = {"steps": 4, "guidance": 5.0, "sampler": "dpmpp_2m", "schedule": "leading", "levels": levels}
    return Task(model="small-sd", folder=folder, size=64, batch=2, threads=1, **how)


# the task


def test_every_runner_gets_the_ids_that_fewstep_reads():
    for run in (0, 5, 74):
        ids = tokenize(["", prompt(run)], WORDS).ids[:, 0]
        assert (token_ids(prompt(run), guided=True) == ids.numpy()).all()
        assert (token_ids(prompt(run), guided=False) == ids[1:].numpy()).all()


def test_each_run_has_a_prompt_of_its_own():
    assert len({prompt(run) for run in range(75)}) == 75


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_shared_loop_is_fewsteps_own_sampler(sampler, steps):
    config = SchedulerConfig()
    levels = noise_levels_of("small-sd", steps, sampler)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * levels.scale

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(x + t / 1000)

    def noise() -> torch.Tensor:
        raise AssertionError("neither sampler draws noise")

    *_, last = SAMPLERS[sampler](denoiser(predict, config.noise_schedule), x, levels.sigmas, noise=noise)
    for value in (x, x.numpy()):
        found = sample(lambda x, step: np.tanh(x + levels.times[step] / 1000), value, levels.sigmas, sampler)
        np.testing.assert_allclose(np.asarray(found), last.x.numpy(), rtol=1e-4, atol=1e-5)


def test_networks_in_the_shared_loop_draw_what_fewsteps_pipeline_draws(model, task):
    engine = EagerEngine(model.spec, model.networks)

    def predict(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return engine.predict(x, t[:1].expand(len(x)), Conditioning(context=context))

    networks = {
        "text": lambda ids: engine.encode_text([ids[:, None]])[0],
        "unet": predict,
        "decode": lambda latents: engine.decode(latents * task.scaling),
    }
    diffusers_runner = torch.inference_mode()(run_of(task, networks, torch_arrays("cpu")))
    mine = fewstep_runner.load(task, plain=True)
    for _ in range(2):
        expected, found = mine(), diffusers_runner()
        np.testing.assert_allclose(found.output.numpy(), expected.output.numpy(), rtol=1e-3, atol=1e-4)
        assert found.stages.keys() == expected.stages.keys() == {"text", "unet", "decode"}


def test_fewstep_is_measured_in_a_process_of_its_own(task):
    (found,) = measured([replace(runners.FEWSTEP, name="f")], replace(task, part="unet"), runs=1, turns=1)
    assert found.problem is None
    assert len(found.seconds) == len(found.first) == 1
    assert found.first[0] > found.loaded[0] > 0
    assert found.output.shape == (2, 4, 8, 8)
    assert found.peak > 50e6


def test_arithmetic_is_counted_for_every_stage(task, tmp_path):
    known = entry("small-sd").unet
    assert known is not None
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(known.to_diffusers(64)), encoding="utf-8")
    real = replace(task, folder=tmp_path)
    counted = flops(real)
    assert list(counted) == ["text", "unet", "decode"]
    assert counted["unet"] == 4 * flops(replace(real, part="unet", batch=4))["unet"] > 0


def test_inputs_are_the_same_in_every_process(task):
    one, other = (inputs(task, Piece("unet", 2)) for _ in range(2))
    assert [value.shape for value in one] == [(2, 4, 8, 8), (2,), (2, 77, 32)]
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


# the report


def runner(name: str, **options: Any) -> runners.Runner:
    return runners.Runner(name=name, load=fewstep_runner.load, packages=("numpy",), **options)


def found(name: str, *seconds: float, output: float = 1.0, **options: Any) -> RunnerResult:
    stages = tuple({"text": each / 4, "unet": each / 2, "decode": each / 4} for each in seconds)
    return RunnerResult(
        runner=runner(name, **options),
        first=(9.0,),
        loaded=(8.0,),
        seconds=seconds,
        stages=stages,
        peak=1_500_000_000,
        output=np.array([output, 2.0]),
    )


FACTS = report.Facts(
    hardware="box",
    runs=3,
    turns=2,
    flops={"text": 1e9, "unet": 5e9, "decode": 2e9},
    peaks=Peaks(product=1e10, convolution=2e10, copy=3e10),
    command="python -m benchmarks.speed --model sd-turbo",
    commit="abc1234",
)


def cells(text: str, name: str) -> dict[str, str]:
    """The row of a table that starts with `name`, by the heads."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    row = next(row for row in rows[1:] if row[0].startswith(name))
    return dict(zip(rows[0], row, strict=True))


@pytest.fixture
def compared(task: Task) -> str:
    rows = [
        found("fewstep", 1.0, 4.0, 2.0, output=1.5, peer=False),
        found("diffusers", 6.0, 5.0, 7.0),
        found("openvino", 3.0, 3.5, 2.5),
        found("other", 8.0, 8.0, 8.0, comparable=False),
        replace(found("broken"), problem="RuntimeError: no"),
    ]
    return report.comparison(rows, {"absent": "pip install absent"}, task, FACTS, "diffusers")


def test_medians_spread_ratios_and_speed(compared):
    row = cells(compared, "fewstep")
    assert row["s"] == "2.000"
    assert row["least to most"] == "1.000 to 4.000"
    assert row["times as fast as the fastest peer"] == "1.50"
    assert row["unet, s"] == "1.000"
    assert row["GFLOP/s (of the peak)"] == "4 (20%)"
    assert row["peak GB"] == "1.50"
    assert cells(compared, "openvino")["times as fast as the fastest peer"] == "1.00"


def test_errors_are_those_against_diffusers(compared):
    assert cells(compared, "fewstep")["error"] == "2.5e-01"
    assert cells(compared, "diffusers")["error"] == ""
    assert cells(compared, "other")["error"] == "other noise"


def test_who_has_not_run_is_told_with_the_reason_or_the_command(compared):
    assert "- broken: not run. RuntimeError: no" in compared
    assert "- absent: not run, not installed; `pip install absent`" in compared
    assert FACTS.command in compared


def test_a_runner_says_its_versions_or_what_to_install():
    assert runner("one").versions() == f"numpy {np.__version__}"
    assert runner("one").missing() is None
    lacks = replace(runner("one"), packages=("numpy", "fewstep-of-nowhere"))
    assert lacks.missing() == "pip install numpy fewstep-of-nowhere"


def test_stage_times_of_stable_diffusion_cpp_are_read_from_what_it_says():
    log_lines = [
        "stable-diffusion.cpp:1 - sampling completed, taking 1.50s\n",
        "- something else completed, taking 9.00s",
    ]
    log_lines += ["x - decode_first_stage completed, taking 0.25s\n"] * 2
    assert stages(log_lines) == {"unet": 1.5, "decode": 0.5}


# the waterfall


def test_the_waterfall_adds_one_optimization_after_the_other():
    rows, names = waterfall.rows(), [each.name for each in fields(Optimizations)]
    assert [row.name for row in rows] == ["plain engine", "+ huge_pages", *(f"+ {name}" for name in names)]
    assert rows[0].environment == fewstep_runner.SMALL_PAGES
    assert all(row.environment == fewstep_runner.HUGE_PAGES for row in rows[1:])
    for count, row in enumerate(rows[2:], start=1):
        assert row.options["optimizations"] == {name: i < count for i, name in enumerate(names)}


def test_an_optimization_that_is_left_out_stays_out():
    first, *others = (each.name for each in fields(Optimizations))
    rows = waterfall.rows(without=("huge_pages", first))
    assert [row.name for row in rows] == ["plain engine", *(f"+ {name}" for name in others)]
    assert all(row.environment == fewstep_runner.SMALL_PAGES for row in rows)
    assert not any(row.options["optimizations"][first] for row in rows[1:])
    without_optimizations = runners.without_optimizations(runners.FEWSTEP, ("huge_pages", first))
    assert without_optimizations.options["optimizations"] == {first: False}
    assert without_optimizations.environment == fewstep_runner.SMALL_PAGES


def test_the_waterfall_says_what_each_optimization_gives(task):
    found_rows = [found("plain engine", 4.0), found("+ one", 2.0, output=1.2), found("+ two", 1.0)]
    text = report.waterfall(found_rows, {"+ one": "The first."}, task, FACTS)
    assert "Commit: abc1234." in text
    assert [cells(text, name)["gives"] for name in ("plain engine", "+ one", "+ two")] == ["", "x 2.00", "x 2.00"]
    assert cells(text, "+ two")["in all"] == "x 4.00"
    assert cells(text, "+ one")["error"] == "1.0e-01"
    assert cells(text, "+ one")["what it is"] == "The first."


def test_every_optimization_is_described():
    assert {f"+ {each.name}" for each in fields(Optimizations)} < waterfall.descriptions().keys()
    assert all(waterfall.descriptions().values())


# what is asked for


def options_of(*words: str) -> BenchmarkOptions:
    return parse_options(command_parser(waterfall.names, tuple(suite.SUITES), None).parse_args(words))


def test_the_command_of_a_result_asks_for_the_same():
    words = ["--model", "small-sd", "--part", "unet", "--size", "256", "--peers", "fewstep+openvino", "--runs", "3"]
    options = options_of(*words, "--hardware", "box", "--without", "kernels")
    assert options_of(*shlex.split(options.command())[3:]) == options


def test_a_device_that_is_not_there_ends_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no CUDA device here"):
        options_of("--device", "cuda")
    with pytest.raises(SystemExit, match="cpu and on cuda"):
        options_of("--device", "tpu")


def test_optimizations_belong_to_a_device(capsys):
    rows = waterfall.rows(device="cuda")
    assert [row.name for row in rows] == ["plain engine", *(f"+ {each.name}" for each in fields(CudaOptimizations))]
    assert all(waterfall.descriptions("cuda")[row.name] for row in rows)
    with pytest.raises(SystemExit, match="graphs: no optimization of the engine for cpu; there are huge_pages, onednn"):
        main(["--without", "graphs", "--size", "64"])


def test_peers_are_chosen_by_name(task):
    assert len(runners.select_runners("all", task)) == len(runners.CPU)
    part = replace(task, part="unet")
    assert not [each.name for each in runners.select_runners("all", part) if each.whole]
    assert [each.name for each in runners.select_runners("openvino + diffusers", part)] == ["openvino", "diffusers"]
    with pytest.raises(SystemExit, match="did you mean 'openvino'"):
        runners.select_runners("openvin", task)
    with pytest.raises(SystemExit, match="whole images alone"):
        runners.select_runners("stable-diffusion.cpp, f16", part)


def test_cuda_has_an_oracle_and_peers_of_its_own(task):
    names = [each.name for each in runners.select_runners("all", replace(task, device="cuda"))]
    assert runners.oracle("cuda:0") in names
    assert {"fewstep", "diffusers", "onnxruntime", "tensorrt"} < set(names)
    assert runners.oracle("cpu") in [each.name for each in runners.CPU]


@pytest.mark.parametrize(("runs", "turns", "expected"), [(5, 2, [3, 2]), (1, 2, [1]), (6, 3, [2, 2, 2])])
def test_runs_are_shared_among_turns(runs, turns, expected):
    assert shares(runs, turns) == expected


def test_hardware_has_a_short_name(monkeypatch):
    monkeypatch.setattr("benchmarks.speed.machine.processor", lambda: "Intel(R) Xeon(R) CPU E5-2680 @ 2.40GHz")
    assert hardware_name("cpu", 4) == "intel-xeon-e5-2680-4core"


# suites


@pytest.fixture
def rows(tmp_path: Path) -> list[BenchmarkOptions]:
    options = BenchmarkOptions(hardware="box", results=tmp_path / "results", cache=tmp_path / "cache")
    return [replace(options, model=model) for model in ("sd-turbo", "small-sd")]


def test_a_suite_goes_on_after_a_failure_and_says_so(rows, capsys):
    def measure(options: BenchmarkOptions) -> Path:
        if options.model == "sd-turbo":
            raise SystemExit("error: no")
        return options.place()

    assert suite.run_suite(rows, measure, resume=False, keep=True) == 1
    answer = capsys.readouterr().err
    assert "failed: SystemExit: error: no" in answer
    assert f"done: {rows[1].place()}" in answer
    assert "1 of 2 rows are done" in answer


def test_a_suite_goes_on_where_it_was_left(rows):
    rows[0].place().parent.mkdir()
    rows[0].place().touch()
    measured: list[str] = []

    def measure(options: BenchmarkOptions) -> Path:
        measured.append(options.model)
        return options.place()

    assert suite.run_suite(rows, measure, resume=True, keep=True) == 0
    assert measured == ["small-sd"]


def test_what_peers_had_converted_goes_after_a_models_last_row(rows):
    kept, gone = (rows[0].cache / "random-sd-turbo" / name for name in ("unet", "onnx"))
    seen: list[bool] = []

    def measure(options: BenchmarkOptions) -> Path:
        for folder in (kept, gone):
            folder.mkdir(parents=True, exist_ok=True)
        seen.append(gone.is_dir())
        return options.place()

    suite.run_suite([rows[0], rows[0]], measure, resume=False, keep=False)
    assert seen == [True, True]
    assert kept.is_dir()
    assert not gone.exists()


@pytest.mark.parametrize("name", suite.SUITES)
def test_each_row_of_a_suite_has_a_file_of_its_own_and_models_stand_together(name):
    found_rows = suite.suite_options(name, BenchmarkOptions(hardware="box"))
    assert len({row.place() for row in found_rows}) == len(found_rows)
    models = [row.model for row in found_rows]
    changes = sum(a != b for a, b in pairwise(models))
    assert changes == len(set(models)) - 1


def test_a_run_without_stages_has_none():
    assert found("one", 1.0).stage("other") is None
    assert RunOutput(1).stages == {}
