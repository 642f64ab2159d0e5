"""The engine exam: what the engine for CPUs draws is what the plain engine draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep import Pipeline
from fewstep.engines.autotune import Autotuner
from fewstep.engines.cpu import convolution, engine
from fewstep.engines.cpu.build import kernels
from fewstep.engines.cpu.context import LayerContext
from fewstep.engines.cpu.engine import CpuEngine
from fewstep.engines.cpu.optimizations import Optimizations
from fewstep.engines.engine import Conditioning
from fewstep.engines.replace_layers import replace_layers
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE
from fewstep.weights.load import load_model
from tests.parity.engine_exam import PROMPTS, SIZE, Last, Pair, assert_same, error, picture


@pytest.fixture(autouse=True, params=["kernels", "tensor operations"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels and without; the tiny models have fewer channels than fast convolutions ask for."""
    if request.param == "kernels" and kernels() is None:
        pytest.skip("no C compiler; pip install 'fewstep[kernels]'")
    monkeypatch.setattr(engine, "kernels", kernels if request.param == "kernels" else lambda: None)
    monkeypatch.setattr(convolution, "FEWEST_CHANNELS", 1)


def pair(path: Path | str, *, strict: bool = False) -> Pair:
    """The same model with the plain engine and with that for CPUs, both with weights of their own."""
    first, second = (load_model(path, dtype=torch.float32) for _ in range(2))
    return Pipeline.of(first, plain=True), Pipeline(
        second.spec, second.tokenizers, CpuEngine(second.spec, second.networks, strict=strict, autotuner=Last())
    )


@pytest.mark.parametrize("width", [16, 64])
def test_tiny_autoencoders(width: int) -> None:
    plain = TinyAutoencoder(width)
    quick, latents, image = fast_copy(plain), torch.randn(2, 4, 7, 9), torch.rand(2, 3, 56, 72) * 2 - 1
    with torch.no_grad():
        assert error(quick.decode(latents), plain.decode(latents)) <= 1e-5
        assert error(quick.encode(image), plain.encode(image)) <= 1e-5


def test_the_strict_engine_is_closer(folder: Callable[[str], Path]) -> None:
    options = {"steps": 2, "seed": [1, 2], "output": "latent", **SIZE}
    plain, strict = (pipe.text_to_image(PROMPTS, **options).latents for pipe in pair(folder("sd2"), strict=True))
    assert error(strict, plain) <= 1e-5


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_weights_in_half_the_memory(folder: Callable[[str], Path], kind: str) -> None:
    halves = load_model(folder(kind), dtype=torch.float16)
    wide = load_model(folder(kind), dtype=torch.float16)
    for network in (wide.networks.unet, wide.networks.autoencoder, *wide.networks.text_encoders):
        network.float()
    both = (
        Pipeline.of(wide, plain=True),
        Pipeline(halves.spec, halves.tokenizers, CpuEngine(halves.spec, halves.networks, autotuner=Last())),
    )
    assert_same(both, "text_to_image", steps=2, guidance_scale=4.0, seed=[1, 2], **SIZE)
    assert_same(both, "image_to_image", picture(), steps=2, strength=0.5, seed=[1, 2])
    assert all(each.dtype == torch.float16 for each in halves.networks.unet.parameters())


def test_a_format_that_it_cannot_read_goes_to_the_plain_engine(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(folder("sd1"), dtype=torch.float32)
    fast = CpuEngine(model.spec, model.networks, autotuner=Last())
    x, told = torch.randn(1, 4, 8, 8), Conditioning(context=torch.randn(1, 77, model.spec.unet.context))
    before = fast.predict(x, torch.tensor([10.0]), told)
    model.networks.unet.bfloat16()
    with caplog.at_level("DEBUG", logger="fewstep"):
        assert error(fast.predict(x, torch.tensor([10.0]), told), before) < 0.1
        fast.predict(x, torch.tensor([10.0]), told)
    assert [record.message.split(": ")[1] for record in caplog.records] == ["the plain engine runs it"]


def fast_copy(network: nn.Module) -> nn.Module:
    ctx = LayerContext(autotuner=Last(), kernels=engine.kernels(), optimizations=Optimizations(), budget=engine.BUDGET)
    return replace_layers(network.eval().requires_grad_(False), engine.layer_map(ctx))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd-v1-4", "small-sd", "sd-v2-1", "sdxl-base", "sdxl-refiner"])
def test_full_size_unets(name: str) -> None:
    config = CATALOGUE[name].unet
    assert config is not None
    unet = UNet(config)
    x, context = torch.randn(2, config.in_channels, 32, 45), torch.randn(2, 77, config.context)
    told = [torch.full((2,), 500.0), context]
    if config.addition is not None:
        pooled = config.addition - config.size_numbers * config.size_features
        told += [torch.randn(2, pooled), torch.randn(2, config.size_numbers).abs() * 512]
    with torch.no_grad():
        found = error(fast_copy(unet)(x.contiguous(memory_format=torch.channels_last), *told), unet(x, *told))
    print(f"{name}: {found:.1e}")
    assert found <= 1e-4


@pytest.mark.slow
def test_the_full_size_autoencoder_at_520_by_712() -> None:
    config = CATALOGUE["sd-v1-4"].autoencoder
    assert config is not None
    plain = AutoencoderKL(config)
    quick = fast_copy(plain)
    latents, image = torch.randn(1, 4, 65, 89), torch.randn(1, 3, 520, 712).clamp(-1, 1)
    latents, image = (x.contiguous(memory_format=torch.channels_last) for x in (latents, image))
    with torch.no_grad():
        found = [error(quick.decode(latents), plain.decode(latents)), error(quick.encode(image), plain.encode(image))]
    print(f"decode {found[0]:.1e}, encode {found[1]:.1e}")
    assert max(found) <= 1e-4


def test_weights_that_change_and_prompts_that_change_count_at_once(folder: Callable[[str], Path]) -> None:
    both = pair(folder("sd1"))
    options = {"steps": 2, "seed": 1, "guidance_scale": 3.0, "output": "latent", "width": 64, "height": 64}
    for prompt in PROMPTS:
        plain, fast = (pipe.text_to_image(prompt, **options).latents for pipe in both)
        assert error(fast, plain) <= 1e-4
    before = plain
    for pipe in both:
        for name, parameter in pipe.networks.unet.named_parameters():
            if name.endswith(("conv1.weight", "to_k.weight", "to_q.weight")):
                parameter *= 1.5
    plain, fast = (pipe.text_to_image(PROMPTS[-1], **options).latents for pipe in both)
    assert error(plain, before) > 1e-3
    assert error(fast, plain) <= 1e-4


def test_a_way_is_measured_once_and_remembered(tmp_path: Path) -> None:
    path, calls = tmp_path / "cache" / "cpu.json", []

    def candidate(name: str, work: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            calls.append(name)
            return sum((torch.ones(300, 300) @ torch.ones(300, 300) for _ in range(work)), torch.zeros(1))

        return run

    candidates = {"slow": candidate("slow", 60), "quick": candidate("quick", 1)}
    Autotuner(path).run("a", candidates)
    assert set(calls) == {"slow", "quick"}
    assert json.loads(path.read_text()) == {"a": "quick"}
    calls.clear()
    Autotuner(path).run("a", candidates)
    assert calls == ["quick"]


DAMAGED = {
    "cut": "{",
    "a list": "[1]",
    "a number": '{"a": 3}',
    "a candidate that is gone": '{"a": "gone"}',
    "nested": "[" * 100_000,
    "large": '{"a": "' + "x" * (2 << 20) + '"}',
    "half a letter": '{"a": "\\ud800"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_memory_is_made_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(content)
    candidates = {"one": lambda: torch.ones(1), "other": lambda: torch.ones(1)}
    assert Autotuner(path).run("a", candidates) == 1
    assert json.loads(path.read_text())["a"] in candidates


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    candidates = {"one": lambda: torch.ones(1), "other": lambda: torch.ones(1)}
    assert Autotuner(tmp_path / "file" / "cpu.json").run("a", candidates) == 1
