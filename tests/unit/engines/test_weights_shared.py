"""Weights that change while others compute with them: LoRAs come and go between steps, and no change is missed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.adapters import merge
from fewstep.adapters.lora import Factors, Lora, layers_of, networks
from fewstep.adapters.merge import add_lora, remove_lora
from fewstep.engines.cache import weights_version
from fewstep.engines.engine import Conditioning
from fewstep.locks import WeightsLock, made_once
from tests import factories

SOON = 0.2  # seconds in which a thread that may go on does
LATE = 20  # seconds after which one that should go on never will


@pytest.fixture
def pipe() -> fewstep.Pipeline:
    model = factories.small_model("sd1")
    for network in model.networks:
        network.eval().requires_grad_(False)
    return fewstep.Pipeline.of(model)


def lora_of(pipe: fewstep.Pipeline, seed: int) -> Lora:
    """Of all layers."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, layer in layers_of(networks(pipe)).items():
        weight = layer.weight
        down = 0.3 * torch.randn(2, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=generator)
        factors[name] = Factors(down=down, up=up, alpha=2.0)
    return Lora(name=str(seed), layers=factors)


def predicted(pipe: fewstep.Pipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 64, generator=generator)
    return pipe.engine.predict(x, torch.tensor([500.0]), Conditioning(context=context))


def begun(action: Callable[[], Any]) -> tuple[threading.Thread, threading.Event]:
    """A thread that does it, and what is set when it is done."""
    done = threading.Event()

    def run() -> None:
        action()
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def hold(block: Any, inside: threading.Event, leave: threading.Event) -> None:
    with block:
        inside.set()
        leave.wait(LATE)


def test_a_change_waits_for_those_who_compute_and_goes_before_those_who_come() -> None:
    lock, inside, leave = WeightsLock(), threading.Event(), threading.Event()
    begun(lambda: hold(lock.computing(), inside, leave))
    inside.wait(LATE)
    with lock.computing():  # many may compute at once
        pass
    changing, changed, end = threading.Event(), threading.Event(), threading.Event()
    begun(lambda: hold(lock.changing(), changing, end))
    assert not changing.wait(SOON)
    _, came = begun(lambda: hold(lock.computing(), changed, end))
    assert not came.wait(SOON)
    leave.set()
    assert changing.wait(LATE)
    assert not changed.wait(SOON)  # nobody computes while weights change
    end.set()
    assert came.wait(LATE)


def test_who_computes_may_say_so_again_while_a_change_waits() -> None:
    lock, changed = WeightsLock(), threading.Event()
    with lock.computing():
        begun(lambda: hold(lock.changing(), changed, changed))
        assert not changed.wait(SOON)
        with lock.computing():
            pass
        assert not changed.is_set()
    assert changed.wait(LATE)


def test_errors_leave_the_lock_free() -> None:
    lock = WeightsLock()
    for block in (lock.computing, lock.changing):
        with pytest.raises(KeyError), block():
            raise KeyError
    with lock.changing():
        pass


def test_a_copy_of_a_model_has_a_lock_of_its_own(pipe: fewstep.Pipeline) -> None:
    with pipe.networks.lock.computing(), copy.deepcopy(pipe.networks.lock).changing():
        assert isinstance(pickle.loads(pickle.dumps(pipe.networks.lock)), WeightsLock)
    assert replace(pipe.networks, tiny=None).lock is pipe.networks.lock  # the same networks


def test_a_lora_waits_for_the_step_that_is_computed(pipe: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that another thread computes with are neither half the new ones nor freed under it."""
    lora, unet = lora_of(pipe, 1), pipe.engine._fast.networks.unet  # type: ignore[attr-defined]
    conv_in, seen = unet.conv_in.forward, list[bool]()
    weight = layers_of(networks(pipe))["unet.conv_in"].weight

    def interrupted(x: Tensor) -> Tensor:
        before = weight.data_ptr(), weight.clone()
        thread, done = begun(lambda: add_lora(pipe, lora))
        seen.append(done.wait(SOON) or weight.data_ptr() != before[0] or not torch.equal(weight, before[1]))
        threads.append((thread, done))
        return conv_in(x)

    threads: list[tuple[threading.Thread, threading.Event]] = []
    plain = predicted(pipe)
    monkeypatch.setattr(unet.conv_in, "forward", interrupted)
    assert torch.equal(predicted(pipe), plain)
    monkeypatch.undo()
    assert threads[0][1].wait(LATE)
    assert seen == [False]
    assert not torch.equal(predicted(pipe), plain)
    remove_lora(pipe)
    assert torch.equal(predicted(pipe), plain)


def test_a_model_is_not_moved_while_another_thread_computes_with_it(
    pipe: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, moved = pipe.engine._fast.networks.unet, list[bool]()  # type: ignore[attr-defined]
    conv_in, plain = unet.conv_in.forward, predicted(pipe)

    def interrupted(x: Tensor) -> Tensor:
        _, done = begun(lambda: pipe.to("cpu", "float16"))
        moved.append(done.wait(SOON))
        threads.append(done)
        return conv_in(x)

    threads: list[threading.Event] = []
    monkeypatch.setattr(unet.conv_in, "forward", interrupted)
    assert torch.equal(predicted(pipe), plain)
    monkeypatch.undo()
    assert threads[0].wait(LATE)
    assert moved == [False]
    assert pipe.networks.unet.conv_in.weight.dtype == torch.float16


def test_every_change_of_a_weight_is_seen_wherever_its_memory_lies(pipe: fewstep.Pipeline) -> None:
    """A new weight may lie where an old one lay: what was made of that one is not what is made of this one."""
    weights = [layer.weight for layer in layers_of(networks(pipe)).values()]
    states = [[weights_version(weight) for weight in weights]]
    for seed in range(4):
        add_lora(pipe, lora_of(pipe, seed))
        states.append([weights_version(weight) for weight in weights])
        remove_lora(pipe)
        states.append([weights_version(weight) for weight in weights])
    for of_one in zip(*states, strict=True):
        assert len(set(of_one)) == len(states)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_model_loaded_and_changed_in_any_mode_shows_its_changes(mode: Any) -> None:
    with mode():
        pipe = fewstep.load("blocks-base", device="cpu")
        weight = pipe.networks.unet.conv_in.weight
        before = weights_version(weight)
        add_lora(pipe, lora_of(pipe, 1))
        remove_lora(pipe)
    assert not weight.is_inference()
    assert weights_version(weight) != before


def test_loras_that_two_threads_add_at_once_are_both_merged(
    pipe: fewstep.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And both come out again: neither thread takes the other's merged weights for the model's own."""
    loras, plain, summed = [lora_of(pipe, seed) for seed in (1, 2)], predicted(pipe), merge._summed
    both = threading.Barrier(2)

    def together(*given: Any) -> Tensor:
        """Waits until the other thread is here as well, or until it cannot be."""
        if not both.broken:
            with suppress(threading.BrokenBarrierError):
                both.wait(SOON)
        return summed(*given)

    monkeypatch.setattr(merge, "_summed", together)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda lora: add_lora(pipe, lora), loras))
    merged = predicted(pipe)
    assert len(merge._applied(pipe)) == 2
    remove_lora(pipe)
    assert torch.equal(predicted(pipe), plain)
    for lora in loras:
        add_lora(pipe, lora)
    assert (predicted(pipe) - merged).norm() < 1e-5 * merged.norm()  # in which order they were added is left to chance


def test_what_is_made_once_is_made_by_one_thread() -> None:
    made, both = list[int](), threading.Barrier(4, timeout=LATE)

    @made_once
    def make(number: int) -> object:
        made.append(number)
        threading.Event().wait(0.05)  # the others ask meanwhile
        return object()

    def ask(_: int) -> object:
        both.wait()
        return make(7)

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(ask, range(4)))) == 1
    assert made == [7]
