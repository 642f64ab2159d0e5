"""An engine that reads nothing but files draws through the same pipeline: the seam that compiled models fit through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.engines.engine import Conditioning, Embedding
from fewstep.errors import InputError

PROMPT, SIDE = "a red cube on top of a blue sphere", 64


class FileEngine:
    """The four network parts as programs of `torch.export`, each for one batch size and picture size."""

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self.parts = {path.stem: torch.export.load(path).module() for path in folder.glob("*.pt2")}

    def encode_text(self, ids: Sequence[Tensor]) -> Embedding:
        return self.parts["encode_text"](*ids), None

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.parts["predict"](x, t, conditioning.context)

    def decode(self, latents: Tensor) -> Tensor:
        return self.parts["decode"](latents)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts["encode"](image)


class Part(nn.Module):
    """A function of the networks that it reads."""

    def __init__(self, function: Callable[..., object], networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks, self.function = nn.ModuleList(networks), function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


@pytest.fixture(scope="module")
def plain() -> fewstep.Pipeline:
    return fewstep.load("blocks-turbo", device="cpu", dtype="float32", engine="plain")


@pytest.fixture(scope="module")
def compiled(plain: fewstep.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> fewstep.Pipeline:
    folder, engine, spec, side = (
        tmp_path_factory.mktemp("parts"),
        plain.engine,
        plain.spec,
        SIDE // plain.spec.autoencoder.factor,
    )
    ids = torch.zeros(1, 1, plain.tokenizers[0].window, dtype=torch.int64)
    latents, context = torch.zeros(1, 4, side, side), torch.zeros(1, ids.shape[2], spec.unet.context)
    parts: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
        "encode_text": (lambda ids: engine.encode_text([ids])[0], (ids,)),
        "predict": (
            lambda x, t, context: engine.predict(x, t, Conditioning(context=context)),
            (latents, torch.ones(1), context),
        ),
        "decode": (engine.decode, (latents,)),
        "encode": (engine.encode, (torch.zeros(1, 3, SIDE, SIDE),)),
    }
    for name, (function, inputs) in parts.items():
        program = torch.export.export(Part(function, list(plain.networks)), inputs, strict=False)
        torch.export.save(program, folder / f"{name}.pt2")
    return fewstep.Pipeline(spec, plain.tokenizers, FileEngine(folder))


def test_it_draws_the_same_pictures(plain: fewstep.Pipeline, compiled: fewstep.Pipeline) -> None:
    first, second = (
        pipe.text_to_image(PROMPT, seed=3, width=SIDE, height=SIDE).images[0] for pipe in (plain, compiled)
    )
    assert np.array_equal(first, second)
    first, second = (
        pipe.image_to_image(PROMPT, first, strength=0.5, steps=4, seed=3).images[0] for pipe in (plain, compiled)
    )
    assert np.array_equal(first, second)


def test_what_needs_torch_networks_says_so(compiled: fewstep.Pipeline, tmp_path: Path) -> None:
    for action in (
        lambda: compiled.to("cpu"),
        lambda: compiled.save(tmp_path / "model"),
        lambda: fewstep.remove_lora(compiled),
    ):
        with pytest.raises(InputError, match="compiled files"):
            action()
