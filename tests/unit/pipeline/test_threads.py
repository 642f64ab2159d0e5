"""Threads that share one pipeline draw what each would have drawn alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any

import pytest
import torch

from fewstep.engines import cache as cache_module
from fewstep.engines.autotune import Autotuner
from fewstep.engines.cache import PromptCache, VersionedCache
from fewstep.engines.cpu.context import LayerContext
from fewstep.engines.cpu.optimizations import Optimizations

PROMPTS = ("a red cube on top of a blue sphere", "a green cone", "a small purple torus")


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads that take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_kept_result_belongs_to_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that replaces what is kept, while this one compares, does not give it the other's result."""
    one, two, weight, cache = torch.zeros(2), torch.ones(2), torch.zeros(1), VersionedCache[str]()
    cache.get((weight,), lambda: "one", one)
    same = cache_module._same

    def interrupted(*values: Any) -> bool:
        monkeypatch.setattr(cache_module, "_same", same)
        cache.get((weight,), lambda: "two", two)
        return same(*values)

    monkeypatch.setattr(cache_module, "_same", interrupted)
    assert cache.get((weight,), lambda: pytest.fail("it was kept"), one) == "one"


class Slow(dict[Any, Any]):
    """Lets the other threads go on as soon as something is stored."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        sleep(0.002)


def test_more_texts_than_are_kept_in_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PROMPTS", 1)
    texts, embeddings = [torch.full((1, 1, 4), i) for i in range(3)], PromptCache()
    embeddings._known = Slow()

    def read(number: int) -> int:
        ids = texts[number % len(texts)]
        context, pooled = embeddings.get([ids], [], lambda: (ids.float(), None))
        assert pooled is None
        return int(context.flatten()[0])

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(60))) == [number % len(texts) for number in range(60)]


def test_a_choice_that_was_made_stays() -> None:
    """Of two threads that measure the same key at once, the second takes the choice of the first."""
    autotuner, both = Autotuner(), threading.Barrier(2, timeout=20)
    measured: list[str] = []

    def candidate(thread: str, name: str) -> torch.Tensor:
        measured.append(thread)
        sleep(0.01)  # the other one is at work too by now
        return torch.tensor(float(name == "slow"))

    def run(thread: str) -> float:
        both.wait()
        return float(
            autotuner.run("key", {name: lambda name=name: candidate(thread, name) for name in ("quick", "slow")})
        )

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, ("a", "b"))
    assert first == second == float(autotuner.known["key"] == "slow")
    assert min(measured.count("a"), measured.count("b")) == 1  # the one that came second measured nothing


def test_a_layer_counts_once_in_the_budget_however_many_threads_ask() -> None:
    ctx, layers = (
        LayerContext(autotuner=Autotuner(), kernels=None, optimizations=Optimizations(), budget=10),
        ("one", "two"),
    )
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: ctx.reserve(layers[0], 6), range(20)))
    assert not ctx.reserve(layers[1], 6)
    assert ctx.budget == 4


@pytest.mark.usefixtures("hurried")
def test_pictures_drawn_in_threads_are_those_drawn_alone(embedded: Any) -> None:
    jobs = [(prompt, seed) for seed in range(4) for prompt in PROMPTS]

    def draw(job: tuple[str, int]) -> torch.Tensor:
        prompt, seed = job
        result = embedded.text_to_image(prompt, steps=3, seed=seed, width=64, height=64, output="latent")
        return result.latents

    alone = [draw(job) for job in jobs]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(draw, jobs * 3))
    assert all(torch.equal(one, other) for one, other in zip(alone * 3, together, strict=True))


def test_a_decoder_that_overflows_leaves_the_weights_in_half() -> None:
    """The second try in float32 computes with a copy: another thread reads the same weights meanwhile."""
    from fewstep.engines.eager import EagerEngine

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append((watched.weight.dtype, self.weight.dtype))
            return latents

    seen: list[tuple[torch.dtype, torch.dtype]] = []
    watched = Watching()
    engine = object.__new__(EagerEngine)
    engine.networks, engine.dtype = type("Networks", (), {"autoencoder": watched})(), torch.float16
    engine._in_float32(torch.zeros(1), "decode")
    assert seen == [(torch.float16, torch.float32)]
