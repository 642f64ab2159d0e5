"""The command line as a user meets it: pictures, settings that come back, errors, exit codes, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fewstep
from fewstep import __version__
from fewstep.cli import main, options
from fewstep.images import read_metadata, save_png


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: Any, tmp_path: Path, monkeypatch: Any) -> Cli:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a model with random weights that draws 64 x 64 pictures in milliseconds."""
    import torch

    import fewstep
    from fewstep.models.autoencoder import AutoencoderKL
    from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
    from fewstep.models.networks import Networks
    from fewstep.models.text_encoder import TextEncoder
    from fewstep.models.unet import UNet
    from fewstep.models.zoo import Defaults
    from fewstep.text.tokenizer import word_tokenizer
    from fewstep.weights.model import LoadedModel
    from fewstep.weights.scheduler import SchedulerConfig

    torch.manual_seed(0)
    words = word_tokenizer(["a", "red", "cube", "on", "top", "of", "blue", "sphere"], window=16)
    levels = (Stage(channels=32, resnets=1, depth=1), Stage(channels=32, resnets=1))
    text = TextConfig(vocabulary=len(words), window=16, width=64, layers=1, heads=1, inner=64, eos=len(words) - 1)
    model = LoadedModel.of(
        Networks(
            unet=UNet(UNetConfig(stages=levels, context=64)).eval(),
            autoencoder=AutoencoderKL(AutoencoderConfig(channels=(32, 32, 32, 32), resnets=1)).eval(),
            text_encoders=(TextEncoder(text).eval(),),
        ),
        (words,),
        name="tiny",
        family="sd1",
        scheduler=SchedulerConfig(),
        defaults=Defaults(steps=3, guidance_scale=3.0, sampler="euler", schedule="leading", width=64, height=64),
        licence="CC0-1.0",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    fewstep.Pipeline.of(model).save(folder)
    return folder


@pytest.fixture
def draw(cli: Cli, tiny: Path) -> Cli:
    """`fewstep generate "a red cube" --model tiny`, with more options."""
    return lambda *more: cli("generate", "a red cube", "--model", tiny, *more)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def process(*arguments: object, **keywords: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fewstep", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, **(pipes | keywords))


# help


def test_the_bare_command_helps(cli):
    bare, explicit = cli(), cli("--help")
    assert bare == explicit
    assert bare.code == 0
    for command in ("generate", "models", "inspect"):
        assert command in bare.out


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"], ["generate"]])
def test_help_and_first_errors_import_nothing_heavy(arguments):
    code = (
        "import sys; from fewstep.cli import main; main(sys.argv[1:]);"
        "print('HEAVY', *{'torch', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1].split() == ["HEAVY"]


def test_the_module_is_the_command():
    run = process("--version")
    assert run.communicate(timeout=60) == (f"fewstep {__version__}\n", "")
    assert run.returncode == 0


def test_help_names_every_sampler_and_schedule():
    import fewstep

    assert options.SAMPLERS.split(", ") == list(fewstep.SAMPLERS)
    assert set(options.SCHEDULES.split(", ")) == set(fewstep.SCHEDULES)


def test_a_reader_that_leaves_is_no_error():
    run = process("models", "--json")
    run.stdout.close()
    assert run.stderr.read() == ""
    run.wait(timeout=60)


# generate


def test_the_first_command_of_the_readme(cli):
    run = cli("generate", "a red cube on top of a blue sphere", "-o", "cube.png", "--seed", 7)
    assert run.code == 0, run.err
    assert "does not know" not in run.err
    first = pixels(run.paths[0])
    assert first.std() > 5, "an empty picture"
    again = cli("generate", "--like", "cube.png", "-o", "again.png")
    assert (pixels(again.paths[0]) == first).all()


def test_a_picture_is_written_and_its_path_printed(draw):
    run = draw("-o", "cube.png", "--seed", 7)
    assert run.code == 0, run.err
    assert run.out == "cube.png\n"
    assert pixels(run.paths[0]).shape == (64, 64, 3)
    assert "seed 7" in run.err
    assert "3 tokens" in run.err


def test_quiet_prints_paths_alone(draw):
    run = draw("-q", "--seed", 7)
    assert run == (0, "fewstep-7.png\n", "")


def test_unknown_words_are_named(cli, tiny):
    run = cli("generate", "a red dragon", "--model", tiny)
    assert "does not know: dragon" in run.err


def test_without_a_name_no_file_is_lost(draw):
    first, second = draw("--seed", 7), draw("--seed", 7, "--steps", 2)
    assert (first.out, second.out) == ("fewstep-7.png\n", "fewstep-7-2.png\n")


def test_a_file_that_is_there_stays_unless_it_is_given_up(draw):
    first = pixels(draw("-o", "cube.png", "--seed", 1).paths[0])
    run = draw("-o", "cube.png", "--seed", 2)
    assert (run.code, run.out) == (2, "")
    assert "'cube.png' is there already; overwrite with --force" in run.err
    assert (pixels(Path("cube.png")) == first).all()
    assert (pixels(draw("-o", "cube.png", "--seed", 2, "--force").paths[0]) != first).any()


def test_one_numbered_picture_that_is_there_stops_the_others_too(draw):
    Path("cube-2.png").write_bytes(b"mine")
    run = draw("-o", "cube.png", "-n", 3)
    assert run.code == 2
    assert "'cube-2.png' is there" in run.err
    assert [path.name for path in Path().iterdir()] == ["cube-2.png"]


def test_several_pictures_are_numbered_and_their_seeds_count_up(draw):
    run = draw("-o", "cube.png", "-n", 3, "--seed", 7)
    assert run.out.split() == ["cube-1.png", "cube-2.png", "cube-3.png"]
    alone = draw("-o", "alone.png", "--seed", 8)
    assert (np.abs(pixels(run.paths[1]).astype(int) - pixels(alone.paths[0])) <= 1).all()


def test_a_folder_takes_pictures_named_by_seed(draw):
    Path("out").mkdir()
    assert draw("-o", "out", "-n", 2, "--seed", 7).out.split() == ["out/fewstep-7.png", "out/fewstep-8.png"]


def test_a_fresh_seed_is_told_and_draws_the_same_picture(draw):
    first = draw()
    seed = first.paths[0].stem.removeprefix("fewstep-")
    again = draw("--seed", seed, "-o", "again.png")
    assert (pixels(first.paths[0]) == pixels(again.paths[0])).all()


def test_size_sets_both_sides(draw):
    assert pixels(draw("--size", "72x64", "-o", "a.png").paths[0]).shape == (64, 72, 3)
    assert pixels(draw("--size", "64", "-o", "b.png").paths[0]).shape == (64, 64, 3)


# like


LIKE = [
    ["--sampler", "dpmpp_2m_sde", "--schedule", "karras", "--steps", 4, "--guidance-scale", 2.5],
    ["--negative-prompt", "blue", "--size", "64x72"],
    ["--init", "init.png", "--strength", 0.7],
    ["--init", "init.png", "--mask", "mask.png"],
]


@pytest.fixture
def sources(cli: Cli) -> None:
    """A picture to start from and a mask, in the working folder."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save("init.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("mask.png")


@pytest.mark.parametrize("more", LIKE, ids=lambda more: more[0])
@pytest.mark.usefixtures("sources")
def test_like_draws_the_same_pixels(cli, draw, tiny, more):
    first = draw("-o", "first.png", *more)
    assert first.code == 0, first.err
    again = cli("generate", "--like", "first.png", "--model", tiny, "-o", "again.png")
    assert again.code == 0, again.err
    assert (pixels(Path("first.png")) == pixels(Path("again.png"))).all()


@pytest.mark.usefixtures("sources")
def test_like_finds_files_from_another_folder(cli, draw, tiny, monkeypatch):
    draw("-o", "first.png", "--init", "init.png")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = cli("generate", "--like", "../first.png", "--model", tiny, "-o", "again.png")
    assert again.code == 0, again.err
    assert (pixels(Path("../first.png")) == pixels(Path("again.png"))).all()


def test_options_override_what_like_says(cli, draw, tiny):
    draw("-o", "first.png", "--seed", 7)
    run = cli("generate", "a blue sphere", "--like", "first.png", "--model", tiny, "--seed", 8, "-o", "other.png")
    assert "seed 8" in run.err
    settings = json.loads(cli("inspect", "other.png", "--json").out)["settings"]
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a blue sphere", 8, 3)


@pytest.mark.usefixtures("sources")
def test_like_notices_that_the_first_picture_has_changed(cli, draw, tiny):
    draw("-o", "first.png", "--init", "init.png")
    Image.new("RGB", (64, 64)).save("init.png")
    run = cli("generate", "--like", "first.png", "--model", tiny)
    assert run.code == 2
    assert "has changed" in run.err


def test_like_needs_a_picture_by_fewstep(cli):
    Image.new("RGB", (64, 64)).save("plain.png")
    run = cli("generate", "--like", "plain.png")
    assert run.code == 2
    assert "carries no settings of fewstep" in run.err


@pytest.mark.parametrize(
    "entry",
    [{"wings": 2}, {"steps": "many"}, {"prompt": ["a"]}, {"model": 5}, {"on_step": "x"}, {"output": "latent"}],
    ids=str,
)
def test_like_distrusts_what_a_picture_says(cli, tiny, entry):

    known = {"fewstep": "9.9", "prompt": "a cube", "model": str(tiny)}
    save_png(Image.new("RGB", (8, 8)), "odd.png", known | entry)
    run = cli("generate", "--like", "odd.png")
    assert run.code == 2
    assert f"by fewstep '9.9', says {next(iter(entry))}" in run.err


# pictures to start from


@pytest.mark.usefixtures("sources")
def test_a_mask_keeps_what_is_black(draw):
    """The decoder sees its neighbourhood, so the kept half is compared far from the edge, with another seed."""
    one, two = (
        pixels(draw("--init", "init.png", "--mask", "mask.png", "--seed", s, "-o", f"{s}.png").paths[0]) for s in (1, 2)
    )
    change = np.abs(one.astype(int) - two).mean(axis=(0, 2))
    assert change[:8].mean() < change[-8:].mean()


@pytest.mark.usefixtures("sources")
def test_strength_is_recorded(cli, draw):
    draw("--init", "init.png", "-o", "a.png")
    settings = json.loads(cli("inspect", "a.png", "--json").out)["settings"]
    assert (settings["task"], settings["strength"], settings["init"]) == ("image_to_image", 0.8, "init.png")


@pytest.mark.parametrize("way", [["--handoff", 0.5], ["--strength", 0.5]], ids=["handoff", "redraw"])
def test_the_refiner_finishes_both_ways_and_comes_back(cli, draw, tiny, way):
    plain = pixels(draw("--seed", 7, "--steps", 6, "-o", "plain.png").paths[0])
    refined = draw("--seed", 7, "--steps", 6, "--refiner", tiny, *way, "-o", "refined.png")
    assert refined.code == 0, refined.err
    again = cli("generate", "--like", "refined.png", "--model", tiny, "--refiner", tiny, "-o", "again.png")
    assert again.code == 0, again.err
    assert (pixels(refined.paths[0]) == pixels(again.paths[0])).all()
    assert way[0] == "--handoff" or (pixels(refined.paths[0]) != plain).any()


# what goes wrong


WRONG = {
    "no prompt": (["generate"], 2, "no prompt"),
    "unknown command": (["genrate"], 2, "No such command"),
    "unknown option": (["generate", "x", "--stesp", 3], 2, "--steps"),
    "not a number": (["generate", "x", "--steps", "many"], 2, "--steps"),
    "unknown model": (["generate", "x", "--model", "sd-turob"], 2, "did you mean 'sd-turbo'"),
    "no such file": (["generate", "x", "--model", "gone.safetensors"], 2, "gone.safetensors"),
    "unknown device": (["generate", "x", "--device", "toaster"], 2, "toaster"),
    "mask alone": (["generate", "x", "--mask", "m.png"], 2, "--init"),
    "strength alone": (["generate", "x", "--strength", 0.5], 2, "--init"),
    "handoff alone": (["generate", "x", "--handoff", 0.5], 2, "--refiner"),
    "size twice": (["generate", "x", "--size", 64, "--width", 64], 2, "twice"),
    "size in words": (["generate", "x", "--size", "big"], 2, "WIDTHxHEIGHT"),
    "no folder": (["generate", "x", "-o", "nowhere/cube.png"], 2, "nowhere"),
    "not a picture": (["generate", "x", "-o", "cube.tiff"], 2, "use 'cube.png'"),
    "no init": (["generate", "x", "--init", "gone.png"], 2, "gone.png"),
    "inspect nothing": (["inspect", "gone.png"], 2, "gone.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line_and_an_exit_code(cli, case):
    arguments, code, says = WRONG[case]
    run = cli(*arguments)
    assert (run.code, run.out) == (code, "")
    assert says in run.err
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--width", 100], "96 and 104"),
        (["--sampler", "eular"], "did you mean 'euler'"),
        (["--schedule", "karass"], "did you mean 'karras'"),
        (["--steps", 0], "steps 0"),
        (["--seed", -1], "seed -1"),
        (["-n", 0], "images_per_prompt 0"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(draw, more, says):
    run = draw(*more)
    assert run.code == 2
    assert says in run.err
    assert not list(Path().iterdir())


def test_a_broken_checkpoint_is_exit_code_3(cli):
    Path("page.safetensors").write_text("<!DOCTYPE html><html></html>")
    run = cli("generate", "x", "--model", "page.safetensors")
    assert run.code == 3
    assert "HTML" in run.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (lambda: __import__("fewstep").NotFiniteError("the decoder gave NaN"), "NaN"),
        (MemoryError, "out of memory"),
        (lambda: OSError(28, "No space left on device"), "No space"),
    ],
    ids=["nan", "memory", "disk"],
)
def test_failures_while_drawing_are_exit_code_4(draw, monkeypatch, error, says):
    def fail(*_: object, **__: object) -> None:
        raise error()

    monkeypatch.setattr("fewstep.images.save_png", fail)
    run = draw()
    assert run.code == 4
    assert says in run.err
    assert not list(Path().iterdir())


def test_debug_shows_the_traceback(cli):
    assert "Traceback" not in cli("generate").err
    assert "Traceback" in cli("generate", "--debug").err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_interrupting_under_the_progress_bar_leaves_no_file(tiny, tmp_path):
    terminal, stderr = os.openpty()
    more = ("--model", tiny, "--steps", 1000, "--width", 256, "--height", 256, "-o", "cube.png")
    run = process("generate", "a red cube", *more, cwd=tmp_path, stderr=stderr)
    os.close(stderr)
    assert "generating" in _read_terminal(terminal, until="generating")
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in _read_terminal(terminal)
    assert (run.communicate(timeout=60)[0], run.returncode) == ("", 130)
    assert not list(tmp_path.iterdir())


def _read_terminal(terminal: int, until: str | None = None) -> str:
    """What the process writes to its terminal, to its end or to the first `until`."""
    text = ""
    while until is None or until not in text:
        try:
            text += os.read(terminal, 1024).decode(errors="replace")
        except OSError:  # the process has closed it
            break
    return text


# models and inspect


def test_models_for_programs(cli):
    rows = {row["name"]: row for row in json.loads(cli("models", "--json").out)}
    assert rows["blocks-base"]["cached"] == "embedded"
    assert rows["sd-turbo"]["source"] == "stabilityai/sd-turbo"
    assert all(row["licence"] and row["cached"] in ("yes", "no", "embedded") for row in rows.values())


def test_models_for_people(cli):
    run = cli("models")
    assert run.code == 0
    for word in ("blocks-base", "stabilityai/stable-diffusion-xl-refiner-1.0", "Apache-2.0", "embedded"):
        assert word in run.out


def test_inspect_tells_how_a_picture_was_made(cli, draw):
    draw("-o", "cube.png", "--seed", 7)
    found = json.loads(cli("inspect", "cube.png", "--json").out)
    assert (found["kind"], found["made_by"]) == ("picture", "fewstep")
    assert found["settings"]["seed"] == 7
    text = cli("inspect", "cube.png").out
    assert "a red cube" in text
    assert __version__ in text


def test_inspect_hides_terminal_commands(cli):

    save_png(Image.new("RGB", (8, 8)), "a.png", {"fewstep": "0", "prompt": "\x1b]0;owned\x07"})
    assert "\x1b" not in cli("inspect", "a.png").out


def test_inspect_tells_what_a_folder_is(cli, tiny):
    found = json.loads(cli("inspect", tiny, "--json").out)
    assert (found["family"], found["prediction"], found["licence"]) == ("sd1", "epsilon", "CC0-1.0")
    assert found["parts"]["unet"]["dtypes"] == ["float32"]
    assert found["parts"]["unet"]["parameters"] > 10_000
    assert "parameters, float32" in cli("inspect", tiny).out


def test_inspect_tells_what_a_single_file_is(cli, tiny):
    from fewstep import load
    from fewstep.weights.save import save_single_file

    save_single_file(load(tiny), "tiny.safetensors")
    found = json.loads(cli("inspect", "tiny.safetensors", "--json").out)
    assert (found["family"], found["layout"]) == ("sd1", "original single file")
    assert set(found["parts"]) == {"unet", "vae", "text_encoder"}
    whole = json.loads(cli("inspect", tiny, "--json").out)
    assert found["parts"] == whole["parts"]


def test_inspect_tells_what_a_part_is(cli, tiny):
    weights = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    assert "one part of a diffusers folder" in cli("inspect", weights).out
    assert "one UNet2DConditionModel" in cli("inspect", tiny / "unet").out


def test_inspect_tells_what_a_foreign_file_is(cli):
    Path("weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    run = cli("inspect", "weights.safetensors")
    assert run.code == 3
    assert "git-lfs" in run.err


def test_what_python_saved_is_drawn_again(cli, tmp_path, monkeypatch):
    """Of the embedded model, and of a folder of weights that lies beside the pictures."""
    monkeypatch.chdir(tmp_path)
    fewstep.load("blocks-base").save(tmp_path / "mine")
    for name, model in (("cube", None), ("own", tmp_path / "mine")):
        pipe = fewstep.load(model, dtype="float16", decoder=None if model else "tiny")
        result = pipe.text_to_image("a red cube", seed=3, steps=2, width=64, height=64)
        result.save(f"{name}.png")
        assert str(tmp_path) not in json.dumps(read_metadata(f"{name}.png"))
        assert cli("generate", "--like", f"{name}.png", "-o", f"{name}-again.png").code == 0
        again, once = (np.asarray(Image.open(f"{name}{end}.png"), np.int16) for end in ("-again", ""))
        assert np.abs(again - once).max() <= 1


EVIL = "\x1b]0;owned\x07\x9b31m\u202eevil\u2066"
ACTED_ON = set("\x1b\x07\x9b\u202e\u2066\r")


@pytest.mark.parametrize(
    "arguments",
    [
        ("a red cube", "-m", EVIL),
        ("a red cube", "-m", f"./{EVIL}.safetensors"),
        ("a red cube", "--init", f"{EVIL}.png"),
        ("a red cube", "--sampler", EVIL),
        ("a red cube", "--size", EVIL),
        ("a red cube", "--lora", EVIL),
        ("a red cube", "-o", f"{EVIL}/cube.png"),
        ("--like", f"{EVIL}.png"),
        ("a red cube", "-m", "evil.safetensors"),
        ("a red cube", "--lora", "evil.safetensors"),
        ("a red cube", "--like", "evil.png"),
    ],
)
def test_no_text_from_elsewhere_moves_the_terminal(cli, tmp_path, arguments):
    """In options, in names of tensors, and in what a picture says."""
    save_file({f"{EVIL}\nerror: forged": torch.zeros(1)}, tmp_path / "evil.safetensors")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "evil.png", {"fewstep": EVIL, "prompt": EVIL, EVIL: EVIL})
    run = cli("generate", *arguments)
    assert run.code
    assert not ACTED_ON & set(run.out + run.err), run.err
    assert not any(line.startswith("error: forged") for line in run.err.splitlines())


def test_prompts_are_no_markup(cli):
    run = cli("generate", f"[bold]a red cube[/bold] [/] {EVIL}", "--steps", 1, "--size", 64, "-o", "cube.png")
    assert run.code == 0
    assert not ACTED_ON & set(run.out + run.err)
    assert read_metadata("cube.png")["prompt"].startswith("[bold]a red cube[/bold] [/]")
