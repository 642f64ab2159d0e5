"""What a picture's word loads and costs, what is checked before a model is loaded, and where pictures go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import fewstep
from fewstep.cli import main
from fewstep.images import read_metadata, save_png

COMMIT = "0" * 40
SMALL = ("--steps", "1", "--size", "64")


@pytest.fixture
def cli(capfdbinary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in an empty folder of its own; its exit code, the bytes on stdout, the text on stderr."""
    home = tmp_path / "here"
    home.mkdir()
    monkeypatch.chdir(home)

    def run(*arguments: object) -> tuple[int, bytes, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return run


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `fewstep.load` was asked for; it loads nothing."""
    asked: list[Any] = []

    def load(what: Any = None, **how: Any) -> None:
        asked.append((what, how))
        raise fewstep.CheckpointError("not loaded here")

    monkeypatch.setattr(fewstep, "load", load)
    return asked


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that has the small model `some/decoder`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--some--decoder" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return folder


def picture(**says: Any) -> Path:
    """A picture that says it was drawn by fewstep, so."""
    path = Path("odd.png")
    known = {"fewstep": "0.1.0", "prompt": "a red cube", "seed": 1, "steps": 1, "width": 64, "height": 64}
    save_png(Image.new("RGB", (8, 8)), path, known | says)
    return path


# what a picture's word loads


ELSEWHERE = [
    "/etc/model",
    "~/model",
    "../model",
    "./../../model",
    "./a/../../model",
    "nobody/nothing",
    "../../hub",
    "a/b\0",
    "\\\\host\\share\\model",
    "//host/share/model",
    "C:\\model",
    ".\\..\\..\\model",
    "https://huggingface.co/nobody/nothing",
    "file:///etc/model",
    "sdxl",  # what people type, and fewstep never writes
    "",
]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("option", ["model", "refiner", "decoder"])
@pytest.mark.parametrize("text", ELSEWHERE)
def test_weights_from_elsewhere_are_not_loaded_on_a_pictures_word(cli, loaded, option, text):
    code, out, err = cli("generate", "--like", picture(**{option: text}))
    assert (code, out, loaded) == (2, b"", [])
    assert f"--{option}" in err
    assert "image's word" in err


@pytest.mark.parametrize("option", ["init", "mask"])
@pytest.mark.parametrize("text", ["/etc/passwd", "../secret.png", "./a/../../secret.png", "~/x.png", "\\\\host\\x.png"])
def test_pictures_from_elsewhere_are_not_opened_on_a_pictures_word(cli, loaded, tmp_path, option, text):
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    says = {"init": "odd.png", option: text}
    code, _, err = cli("generate", "--like", picture(**says))
    assert (code, loaded) == (2, [])
    assert f"--{option}" in err
    assert "image's word" in err


def test_loras_and_tokenizers_from_elsewhere_neither(cli, loaded, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    lora = {"file": "../x.safetensors", "scale": 1, "sha256": ""}
    for says, option in (({"lora": [lora]}, "--lora"), ({"tokenizer": "some/decoder"}, "--tokenizer")):
        code, _, err = cli("generate", "--like", picture(**says))
        assert (code, loaded, option in err) == (2, [], True)
    Path("x.safetensors").write_bytes(b"")
    for loras in ([lora | {"file": "x.safetensors"}] * 17, [lora | {"file": "x.safetensors", "scale": float("nan")}]):
        code, _, err = cli("generate", "--like", picture(lora=loras))
        assert (code, loaded, "says lora" in err) == (2, [], True)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("text", ["sd-turbo", "blocks-base", "some/decoder", "./model", "./a/../model"])
def test_names_cached_ids_and_paths_below_are_loaded(cli, loaded, text):
    code, _, err = cli("generate", "--like", picture(model=text))
    assert code == 3, err
    assert loaded[0][0] == ("model" if "./" in text else text)


def test_a_revision_is_loaded_from_the_cache_alone(cli, loaded, cache):
    for model in ("sd-turbo", "some/decoder"):
        code, _, err = cli("generate", "--like", picture(model=model, revision="refs/pr/1"))
        assert (code, loaded, "'refs/pr/1'" in err) == (2, [], True)
    assert cli("generate", "--like", picture(model="some/decoder", revision=COMMIT))[0] == 3


def test_a_model_given_instead_is_loaded_without_what_belonged_to_the_other(cli, loaded):
    says = {"model": "nobody/nothing", "revision": "v2", "prediction": "v_prediction"}
    assert cli("generate", "--like", picture(**says), "--model", "sd-v1-4")[0] == 3
    what, how = loaded[0]
    assert (what, how["revision"], how["prediction"]) == ("sd-v1-4", None, None)


# what it may cost


@pytest.mark.parametrize(
    ("says", "more", "code"),
    [
        ({"steps": 1000, "width": 8192, "height": 8192}, (), 2),
        ({"steps": 1000, "width": 8192, "height": 8192}, ("--steps", 1000), 2),
        ({"steps": 1000, "width": 8192, "height": 8192}, ("--steps", 1000, "--size", "8192x8192"), 3),
        ({"width": 8192, "height": 8192}, (), 2),
        ({"steps": 1000, "width": 1024, "height": 1024}, (), 2),
        ({"steps": 1000, "width": 1024, "height": 1024}, ("--steps", 30), 3),
        ({"steps": 100, "width": 1024, "height": 1024}, (), 3),
        ({"prompt": "red " * 2000}, (), 2),
        ({"prompt": "red " * 2000}, ("a red cube",), 3),
    ],
    ids=str,
)
def test_much_work_is_done_when_it_is_asked_for_twice(cli, loaded, says, more, code):
    got, _, err = cli("generate", *more, "--like", picture(**says))
    assert got == code, err
    assert len(loaded) == (code == 3)
    if code == 2 and "steps" in says:
        asked = f"--steps {says['steps']} --size {says['width']}x{says['height']}"
        assert asked in err


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "true", "9" * 4000, "2.5"])
@pytest.mark.parametrize("name", ["steps", "width", "guidance_scale", "strength", "handoff", "seed", "eta"])
def test_numbers_that_are_none_are_errors_of_ours(cli, loaded, name, value):
    known = {"fewstep": "0", "prompt": "a red cube", "init": "init.png", "steps": 4, "width": 64, "height": 64}
    known |= {"refiner": "blocks-base"} if name == "handoff" else {}
    text = json.dumps({key: of for key, of in known.items() if key != name})[:-1] + f', "{name}": {value}}}'
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("fewstep", text)
    Image.new("RGB", (64, 64)).save("init.png")
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=chunks)
    code, _, err = cli("generate", "--like", "odd.png")
    assert code == 2 or (code == 3 and loaded), err  # 3: a number that will do, such as 2.5 of guidance
    assert err.count("\n") == 1
    assert len(err) < 600


# before anything is loaded


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "sdxl-base", "--steps", 0), "steps 0"),
        (("-m", "sdxl-base", "--guidance-scale", 1000), "guidance_scale"),
        (("-m", "sdxl-base", "--sampler", "eular"), "did you mean 'euler'"),
        (("-m", "sdxl-base", "--schedule", "karass"), "did you mean 'karras'"),
        (("-m", "sdxl-base", "--size", "100x100"), "96 and 104"),
        (("-m", "sdxl-base", "--seed", -1), "seed -1"),
        (("-m", "sdxl-base", "-n", 0), "images_per_prompt 0"),
        (("-m", "sdxl-base", "--prediction", "v"), "unknown prediction 'v'"),
        (("-m", "sd-v1-4", "--refiner", "sdxl-refiner"), "other latents"),
        (("-m", "sdxl-base", "--refiner", "taesd"), "decoder alone"),
        (("-m", "sdxl-base", "--refiner", "sdxl-refinor"), "did you mean 'sdxl-refiner'"),
        (("-m", "sdxl-base", "--refiner", "sdxl-refiner", "--handoff", 2), "handoff 2"),
        (("-m", "sdxl-base", "--decoder", "sd-turbo"), "--decoder sd-turbo is a whole model"),
        (("-m", "taesd"), "decoder alone"),
        (("-m", "sd15"), "sd-v1-4"),
        (("-m", "sd-turbo", "--init", "odd.png", "--strength", 0.5), "runs no step"),
        (("-m", "sdxl-base", "-o", "odd.png"), "is there already"),
        (("-m", "sdxl-base", "-n", 2, "-o", "-"), "one image, not 2"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_known_before_a_model_is_loaded(cli, loaded, arguments, says):
    picture()
    code, out, err = cli("generate", "a lighthouse", *arguments)
    assert (code, out, loaded) == (2, b"", [])
    assert says in err


@pytest.mark.parametrize("more", [("--steps", 0), ("-m", "turbo"), ("--sampler", "eular")], ids=str)
def test_a_batch_is_checked_before_a_model_is_loaded_too(cli, loaded, more):
    Path("prompts.txt").write_text("a red cube\n")
    assert cli("batch", "prompts.txt", "-o", "pictures", *more)[0] == 2
    assert (loaded, Path("pictures").exists()) == ([], False)


# where pictures go


def test_a_folder_is_made_where_the_name_ends_with_a_slash(cli):
    code, out, _ = cli("generate", "a red cube", "--seed", 7, "-o", "new/one/", *SMALL)
    assert (code, out) == (0, b"new/one/fewstep-7.png\n")
    assert Path("new/one/fewstep-7.png").is_file()


def test_a_picture_goes_to_a_program_and_all_else_to_stderr(cli):
    code, out, err = cli("generate", "a red dragon", "--seed", 7, "-o", "-", *SMALL)
    Path("piped.png").write_bytes(out)
    assert (code, Image.open("piped.png").size) == (0, (64, 64))
    assert read_metadata("piped.png")["seed"] == 7
    assert "dragon" in err
    assert [path.name for path in Path().iterdir()] == ["piped.png"]


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG"), ("a.PNG", "PNG")])
def test_the_ending_says_the_format_and_like_reads_it(cli, name, kind):
    code, out, err = cli("generate", "a red cube", "--seed", 7, "-o", name, *SMALL)
    assert code == 0, err
    written = Path(out.decode().strip())
    assert (Image.open(written).format, written.stem) == (kind, "a")
    assert cli("generate", "--like", written, "-o", "again.png")[0] == 0
    assert read_metadata("again.png")["seed"] == 7
    assert json.loads(cli("inspect", written, "--json")[1])["settings"]["prompt"] == "a red cube"


def test_what_had_no_effect_is_said(cli):
    _, _, err = cli("generate", "a red cube", "--negative-prompt", "blue", *SMALL)
    assert any("negative" in line for line in err.splitlines()[1:])
    _, _, err = cli("generate", "a red dragon", *SMALL)
    assert "dragon; those it knows: fewstep models blocks-turbo" in err


def test_a_prompt_of_bytes_that_are_no_text_is_an_error_of_ours(cli, loaded):
    code, _, err = cli("generate", "a red cube \udcff")
    assert (code, loaded) == (2, [])
    assert "UTF-8" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2), ("\n", 2)])
def test_a_person_at_a_terminal_is_asked(cli, answer, code):
    picture()
    before = Path("odd.png").read_bytes()
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "fewstep", "generate", "a red cube", "-q", "-o", "odd.png", *SMALL]
    run = subprocess.Popen(command, stdin=end, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    os.write(terminal, answer.encode())
    assert (run.communicate(timeout=120)[0] == b"odd.png\n", run.returncode) == (code == 0, code)
    assert (Path("odd.png").read_bytes() == before) == (code != 0)
    os.close(terminal)
