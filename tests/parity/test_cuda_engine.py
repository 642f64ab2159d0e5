"""The exam of the engine for NVIDIA cards: on a CPU with graphs played by the host, whole where there is a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import Pipeline
from fewstep.engines.cuda.engine import CudaEngine
from fewstep.engines.cuda.graphs import Graphs
from fewstep.engines.eager import EagerEngine
from fewstep.errors import InputError
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel
from tests.parity.engine_exam import PROMPTS, SIZE, Pair, Replayed, assert_same, error


def engine(model: LoadedModel, **options: bool) -> CudaEngine:
    return CudaEngine(model.spec, model.networks, graphs=Graphs(Replayed), **options)


def pair(path: Path | str, **options: bool) -> Pair:
    first, second = (load_model(path, dtype=torch.float32) for _ in range(2))
    return Pipeline.of(first, plain=True), Pipeline(second.spec, second.tokenizers, engine(second, **options))


def test_changed_weights_count_at_the_next_call(folder: Callable[[str], Path]) -> None:
    plain, fast = pair(folder("sdxl"))
    graphs = fast.engine._graphs
    for change in (None, torch.Tensor.add_, torch.Tensor.sub_):
        for pipe in (plain, fast):
            with torch.no_grad():
                for network in (pipe.networks.unet, *pipe.networks.text_encoders):
                    for weight in network.parameters() if change else ():
                        change(weight, 0.05)
        assert_same((plain, fast), "text_to_image", steps=2, seed=[1, 2])
        assert len(graphs) == 4, "a change in place needs no new graph: text, text_kv, unet, decode"


def test_moved_weights_are_found(folder: Callable[[str], Path]) -> None:
    plain, fast = pair(folder("sd1"))
    assert_same((plain, fast), "text_to_image", steps=2, seed=[1, 2])
    for pipe in (plain, fast):
        for weight in pipe.networks.unet.parameters():
            weight.data = weight.data * 1.1
    assert_same((plain, fast), "text_to_image", steps=2, seed=[1, 2])


def test_a_decoder_that_overflows_is_run_in_float32(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("sd1"), dtype=torch.bfloat16)
    fast = engine(model)
    latents = torch.randn(1, 4, 8, 8)
    exact = load_model(folder("sd1"), dtype=torch.float32)
    wanted = EagerEngine(exact.spec, exact.networks).decode(latents).detach()
    assert error(fast.decode(latents), wanted) < 0.1
    run = fast._decode
    fast._decode = lambda rows: run(rows) * float("nan")
    assert error(fast.decode(latents), wanted) < 0.01


def test_short_memory_splits_the_batch_and_then_the_picture(folder: Callable[[str], Path]) -> None:
    plain, fast = pair(folder("sd1"))
    latents, most = torch.randn(3, 4, 8, 8), [1]
    run = fast.engine._decode

    def limited(rows: Tensor) -> Tensor:
        if len(rows) > most[0]:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
        return run(rows)

    fast.engine._decode = limited
    assert error(fast.engine.decode(latents), plain.engine.decode(latents).detach()) <= 1e-4
    most[0] = 0
    with pytest.raises(InputError, match=r"2.00 GiB more are needed.*free"):
        fast.engine.decode(latents)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")
@pytest.mark.gpu
def test_on_a_card(folder: Callable[[str], Path], kind: str) -> None:
    plain = load_model(folder(kind), dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        model = load_model(folder(kind), dtype=dtype, device=torch.device("cuda"))
        options = {"steps": 2, "guidance_scale": 4.0, "seed": [1, 2], "output": "numpy", **SIZE}
        wanted, found = (
            Pipeline(each.spec, each.tokenizers, run(each)).text_to_image(PROMPTS, **options).array
            for each, run in ((plain, EagerEngine), (model, CudaEngine))
        )
        noise = float(np.square(found - wanted).mean())
        assert -10 * np.log10(noise) >= 35
