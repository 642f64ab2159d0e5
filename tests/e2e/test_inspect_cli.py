"""`fewstep inspect` and `fewstep models` as a user meets them: names, pictures by other programs, and hostile text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from fewstep.cli import main
from fewstep.images import save_png


@pytest.fixture
def cli(capsys: Any, tmp_path: Path, monkeypatch: Any) -> Any:
    """Runs the command in an empty folder; its exit code, and what went to stdout and to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return (code, *capsys.readouterr())

    return run


def picture(name: str, **chunks: Any) -> None:
    """A PNG with these text chunks, as JSON where they are no text."""
    info = PngImagePlugin.PngInfo()
    for chunk, value in chunks.items():
        info.add_text(chunk, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (8, 8)).save(name, pnginfo=info)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


PLAIN = {
    "3": node(
        "KSampler",
        seed=42, steps=20, cfg=7.5, sampler_name="dpmpp_2m", scheduler="karras", denoise=1,
        model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
    ),
    "4": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text="a red cube", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
}  # fmt: skip
CUSTOM = {
    "1": node("SamplerCustomAdvanced", noise=["2", 0], guider=["3", 0], sampler=["4", 0], sigmas=["5", 0]),
    "2": node("RandomNoise", noise_seed=42),
    "3": node("CFGGuider", cfg=7.5, model=["8", 0], positive=["6", 0], negative=["7", 0]),
    "4": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "5": node("BasicScheduler", scheduler="karras", steps=20, model=["8", 0]),
    "6": node("CLIPTextEncode", text=["9", 0]),
    "7": node("CLIPTextEncode", text="blurry"),
    "8": node("UNETLoader", unet_name="sd15.safetensors"),
    "9": node("PrimitiveString", value="a red cube"),
}


@pytest.mark.parametrize("graph", [PLAIN, CUSTOM], ids=["sampler", "custom sampler"])
def test_a_picture_by_comfyui_is_read(cli, graph):
    picture("comfy.png", prompt=graph, workflow={"nodes": []})
    code, out, _ = cli("inspect", "comfy.png", "--json")
    found = json.loads(out)
    assert (code, found["made_by"]) == (0, "ComfyUI")
    expected = {
        "prompt": "a red cube", "negative_prompt": "blurry", "seed": 42, "steps": 20, "guidance_scale": 7.5,
        "sampler": "dpmpp_2m", "schedule": "karras", "model": "sd15.safetensors",
    }  # fmt: skip
    assert expected.items() <= found["settings"].items()


def test_a_workflow_alone_is_read_too(cli):
    nodes = [
        {"type": "KSampler", "widgets_values": [42, "fixed", 20, 7.5, "euler", "normal", 1]},
        {"type": "CLIPTextEncode", "widgets_values": ["a red cube"]},
    ]
    picture("comfy.png", workflow={"nodes": nodes})
    found = json.loads(cli("inspect", "comfy.png", "--json")[1])["settings"]
    assert found == {
        "seed": 42,
        "steps": 20,
        "guidance_scale": 7.5,
        "sampler": "euler",
        "schedule": "normal",
        "prompts": ["a red cube"],
    }


@pytest.mark.parametrize(
    "chunks",
    [
        {"prompt": "{"},
        {"prompt": "[" * 100_000},
        {"prompt": {"1": node("KSampler", steps=1, sampler_name="x", positive=["1", 0])}},  # leads to itself
        {"prompt": {"1": {"inputs": []}, "2": 5, "3": None}},
        {"prompt": {"1": node("KSampler", steps=[[[]]], sampler_name={}, positive=["gone", 0])}},
        {
            "workflow": {
                "nodes": [1, {}, {"type": [], "widgets_values": [1]}, {"type": "KSampler", "widgets_values": 1}]
            }
        },
        {"prompt": "a plain text"},
    ],
    ids=str,
)
def test_graphs_that_are_none_do_no_harm(cli, chunks):
    picture("odd.png", **chunks)
    code, out, err = cli("inspect", "odd.png")
    assert (code, err) == (0, "")
    assert "picture" in out


HOSTILE = "\x1b]0;owned\x07 \x9b31m \u202eevil\u2066 \ud800 \x00 [red]red[/red] one\ntwo\rthree\u2028four"
FORBIDDEN = "\x1b\x07\x9b\u202e\u2066\ud800\x00\r\u2028"


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["people", "programs"])
@pytest.mark.parametrize("key", ["fewstep", "parameters", "prompt"])
def test_nothing_of_a_picture_acts_on_a_terminal(cli, key, more):
    """Values and keys: escape codes, C1 and bidirectional controls, half letters, line breaks that forge a row."""
    if key == "fewstep":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("fewstep", json.dumps({"fewstep": HOSTILE, "prompt": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}))
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    elif key == "parameters":
        picture("a.png", parameters=HOSTILE.replace("\ud800", "").replace("\u202e", "").replace("\u2066", ""))
    else:
        picture(
            "a.png",
            prompt={
                "1": node("KSampler", steps=1, sampler_name=HOSTILE, positive=["2", 0]),
                "2": node("x", text=HOSTILE),
            },
        )
    code, out, err = cli("inspect", "a.png", *more)
    assert code == 0, err
    assert not set(FORBIDDEN) & set(out + err)
    assert "[red]red[/red]" in out
    assert "\ntwo" not in out


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["people", "programs"])
def test_values_in_values_end_in_a_line(cli, more):
    for depth in (5, 300, 900):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("fewstep", '{"a": ' * depth + "1" + "}" * depth)
        Image.new("RGB", (8, 8)).save("deep.png", pnginfo=info)
        code, out, err = cli("inspect", "deep.png", *more)
        assert code in (0, 2), err
        assert more or len((out + err).splitlines()) < 12


def test_long_metadata_is_kept_short(cli):
    save_png(Image.new("RGB", (8, 8)), "a.png", {"fewstep": "0", "prompt": "red " * 10_000})
    _, out, _ = cli("inspect", "a.png")
    assert len(out) < 1000
    assert "(40,000 letters; --json has them all)" in out
    assert len(json.loads(cli("inspect", "a.png", "--json")[1])["settings"]["prompt"]) == 40_000


def test_settings_that_look_like_parts_are_settings(cli):
    save_png(Image.new("RGB", (8, 8)), "a.png", {"fewstep": "0", "x": {"parameters": "many", "dtypes": 3}})
    assert cli("inspect", "a.png")[0] == 0


@pytest.mark.parametrize("command", [("models",), ("inspect",)], ids=str)
def test_what_a_blocks_model_knows_is_listed(cli, command):
    code, out, _ = cli(*command, "blocks-turbo")
    assert code == 0
    for text in ("torus", "purple", "small", "in front of", "behind", "Apache-2.0", "embedded", "steps", "128"):
        assert text in out
    found = json.loads(cli(*command, "blocks-base", "--json")[1])
    assert found["defaults"]["steps"] == 10
    assert "pyramid" in found["words"]["shapes"]


def test_a_model_of_the_hub_is_shown_by_any_of_its_names(cli):
    shown = [cli("models", name)[1] for name in ("sdxl-base", "sdxl", "SDXL_base")]
    assert shown[0] == shown[1] == shown[2]
    assert "stabilityai/stable-diffusion-xl-base-1.0" in shown[0]
    assert cli("models", "turbo")[0] == 2
    code, _, err = cli("inspect", "nobody/nothing")
    assert (code, "cache" in err) == (2, True)
