"""The exams that all engines sit: what each draws is what the plain engine draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch
from PIL import Image

from fewstep import Pipeline
from fewstep.engines.cpu import convolution
from fewstep.engines.cpu.build import kernels
from fewstep.engines.cpu.engine import CpuEngine
from fewstep.engines.cpu.optimizations import Optimizations
from fewstep.engines.cuda.engine import CudaEngine
from fewstep.engines.cuda.graphs import Graphs
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Engine
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel
from tests.parity.engine_exam import SIZE, Last, Pair, Replayed, assert_same, error, picture

Folder = Callable[[str], Path]


class MakePair(Protocol):
    """The same model with the plain engine and with the one that is examined, with weights of their own."""

    def __call__(self, path: Path | str, *, decoder: TinyAutoencoder | None = None) -> Pair: ...


def cpu_engine(model: LoadedModel, *, compiled: bool) -> Engine:
    optimizations = Optimizations(kernels=compiled)
    return CpuEngine(model.spec, model.networks, optimizations=optimizations, autotuner=Last())


ENGINES: dict[str, Callable[[LoadedModel], Engine]] = {
    "eager": lambda model: EagerEngine(model.spec, model.networks),
    "cpu, kernels": lambda model: cpu_engine(model, compiled=True),
    "cpu, tensor operations": lambda model: cpu_engine(model, compiled=False),
    "cuda, graphs played by the host": lambda model: CudaEngine(model.spec, model.networks, graphs=Graphs(Replayed)),
}


@pytest.fixture(params=ENGINES)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakePair:
    """The tiny models have fewer channels than fast convolutions ask for."""
    if request.param == "cpu, kernels" and kernels() is None:
        pytest.skip("no C compiler; pip install 'fewstep[kernels]'")
    monkeypatch.setattr(convolution, "FEWEST_CHANNELS", 1)

    def make(path: Path | str, *, decoder: TinyAutoencoder | None = None) -> Pair:
        first, second = (load_model(path, dtype=torch.float32) for _ in range(2))
        if decoder is not None:
            first, second = first.with_tiny(decoder), second.with_tiny(decoder)
        engine = ENGINES[request.param](second)
        return Pipeline.of(first, plain=True), Pipeline(second.spec, second.tokenizers, engine)

    return make


@pytest.mark.parametrize("kind", ["sd1", "sd2", "turbo", "sdxl", "sdxl-turbo"])
def test_pictures_of_odd_sizes_in_batches(pair: MakePair, folder: Folder, kind: str) -> None:
    assert_same(pair(folder(kind)), "text_to_image", steps=2, guidance_scale=4.0, seed=[1, 2], **SIZE)


@pytest.mark.parametrize("kind", ["sd1", "refiner"])
def test_pictures_from_pictures(pair: MakePair, folder: Folder, kind: str) -> None:
    assert_same(pair(folder(kind)), "image_to_image", picture(), steps=4, strength=0.5, seed=[1, 2])


@pytest.mark.parametrize("kind", ["sd1", "inpaint"])
def test_inpainting(pair: MakePair, folder: Folder, kind: str) -> None:
    mask = Image.new("L", (72, 104))
    mask.paste(255, (16, 8, 48, 56))
    assert_same(pair(folder(kind)), "inpaint", picture(), mask, steps=2, seed=[1, 2])


def test_the_embedded_model(pair: MakePair) -> None:
    assert_same(pair("blocks-base"), "text_to_image", steps=2, seed=[1, 2])


def test_samplers_that_look_back_see_what_was(pair: MakePair, folder: Folder) -> None:
    assert_same(pair(folder("sd1")), "text_to_image", steps=4, sampler="plms", guidance_scale=4.0, seed=[1, 2])


def test_a_tiny_decoder(pair: MakePair, folder: Folder) -> None:
    assert_same(pair(folder("sd1"), decoder=TinyAutoencoder(16).eval()), "text_to_image", steps=1, seed=[1, 2])


def test_other_prompts_of_the_same_shape(pair: MakePair, folder: Folder) -> None:
    plain, fast = pair(folder("sd2"))
    for prompt in ("a cube", "a photo", "a cube"):
        wanted, found = (pipe.text_to_image(prompt, steps=2, seed=1, output="latent").latents for pipe in (plain, fast))
        assert error(found, wanted) <= 1e-4
