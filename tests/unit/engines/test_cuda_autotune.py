"""How the engine for NVIDIA cards chooses between implementations, and those that it brings itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cuda import clock
from fewstep.engines.cuda.clock import DeviceClock
from fewstep.engines.cuda.context import CudaLayerContext
from fewstep.engines.cuda.layers import CudaConv, UpsampleConv
from fewstep.engines.cuda.linear import fused_geglu, fused_linear, matmul_attention
from fewstep.engines.cuda.operations import PlainOperations
from fewstep.engines.cuda.optimizations import CudaOptimizations

PLAIN = PlainOperations()
DTYPES = [torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")


def one() -> Tensor:
    return torch.ones(3)


def also_one() -> Tensor:
    return torch.ones(3) * (1 + 1e-3)


def two() -> Tensor:
    return torch.full((3,), 2.0)


def failing(error: Exception) -> Callable[[], Tensor]:
    def candidate() -> Tensor:
        raise error

    return candidate


class Scripted:
    """A device with known seconds for each function, whatever the host takes."""

    def __init__(self, seconds: dict[Callable[[], Tensor], Iterable[float]], *, capturing: bool = False) -> None:
        self.script, self.capturing = {candidate: iter(each) for candidate, each in seconds.items()}, capturing

    def ready(self) -> bool:
        return not self.capturing

    def seconds(self, candidate: Callable[[], object]) -> float:
        assert not self.capturing
        candidate()
        return next(self.script[candidate])  # type: ignore[index]


# autotuner


def test_a_slow_host_changes_no_choice(tmp_path: Path) -> None:
    def slow_host() -> Tensor:
        sleep(0.02)
        return torch.ones(3)

    autotuner = Autotuner(tmp_path / "a.json", Scripted({one: repeat(2e-5), slow_host: repeat(1e-5)}))
    autotuner.run("key", {"slow kernel": one, "fast kernel": slow_host})
    assert json.loads((tmp_path / "a.json").read_text()) == {"key": "fast kernel"}


def test_the_better_of_two_runs_counts() -> None:
    autotuner = Autotuner(None, Scripted({one: [2e-5, 2e-5], also_one: [9e-5, 1e-5]}))
    autotuner.run("key", {"steady": one, "disturbed": also_one})
    assert autotuner.known == {"key": "disturbed"}


def test_nothing_is_measured_or_stored_during_a_capture(tmp_path: Path) -> None:
    clock = Scripted({one: repeat(2e-5), two: repeat(1e-5)}, capturing=True)
    autotuner, candidates = Autotuner(tmp_path / "a.json", clock), {"first": one, "second": two}
    assert autotuner.run("key", candidates)[0] == 1, "the first one is the one to fall back to"
    assert not autotuner.known
    assert not (tmp_path / "a.json").exists()
    clock.capturing = False
    assert autotuner.run("key", candidates)[0] == 2
    clock.capturing = True
    assert autotuner.run("key", candidates)[0] == 2, "what is known is taken"


def test_a_way_that_raises_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    candidates = {"broken": failing(ValueError("no such shape")), "sound": one}
    autotuner = Autotuner(tmp_path / "a.json", Scripted({one: repeat(1.0)}))
    with caplog.at_level(logging.DEBUG, logger="fewstep"):
        for _ in range(3):
            autotuner.run("key", candidates)
    assert [record.message for record in caplog.records] == ["key: candidate 'broken' is excluded: no such shape"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"key": "sound"}


def test_where_all_ways_raise_the_first_error_is_raised() -> None:
    autotuner = Autotuner(None, Scripted({}))
    with pytest.raises(ValueError, match="first"):
        autotuner.run("key", {"a": failing(ValueError("first")), "b": failing(KeyError("second"))})
    assert not autotuner.known


def test_a_choice_made_when_memory_was_short_is_not_written(tmp_path: Path) -> None:
    path, hungry = tmp_path / "a.json", failing(torch.OutOfMemoryError("2 GiB"))
    autotuner = Autotuner(path, Scripted({one: repeat(1.0), two: repeat(2.0)}))
    assert autotuner.run("short", {"hungry": hungry, "modest": one})[0] == 1
    assert autotuner.known == {"short": "modest"}, "it stays for as long as the process"
    autotuner.run("other", {"one": one, "two": two})
    assert json.loads(path.read_text()) == {"other": "one"}


def test_a_way_that_computes_something_else_is_never_taken() -> None:
    times = {one: repeat(3.0), also_one: repeat(2.0), two: repeat(1.0)}
    candidates = {"reference": one, "rounded": also_one, "wrong": two}
    autotuner = Autotuner(None, Scripted(times), tolerance=0.05)
    assert autotuner.run("key", candidates) is not None
    assert autotuner.known == {"key": "rounded"}


# the clock of a card


class Stream:
    """A card's stream in its own time, and a host that takes some to queue: seconds of both."""

    def __init__(self, launch: float, kernel: float, *, delays: Iterable[float] = ()) -> None:
        self.launch, self.kernel, self.delays = launch, kernel, iter(delays)
        self.host = self.device = 0.0

    def queue(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds

    def candidate(self) -> Tensor:
        self.host += self.launch + next(self.delays, 0.0)
        self.queue(self.kernel)
        return torch.ones(1)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, **_: bool) -> Any:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.device, self.host))
        event.query = lambda: self.host >= event.at
        event.synchronize = self.synchronize
        event.elapsed_time = lambda other: (other.at - event.at) * 1000
        return event

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
        patch.setattr(torch.cuda, "current_stream", lambda: self)
        patch.setattr(torch.cuda, "Event", self.event)
        patch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / clock.HERTZ))
        patch.setattr(clock, "perf_counter", lambda: self.host)


@pytest.mark.parametrize(("launch", "kernel"), [(5e-5, 3e-6), (1e-6, 3e-4), (5e-5, 1.0)])
def test_launches_do_not_count(monkeypatch: pytest.MonkeyPatch, launch: float, kernel: float) -> None:
    stream = Stream(launch, kernel)
    stream.patch(monkeypatch)
    assert DeviceClock(torch.device("cuda")).seconds(stream.candidate) == pytest.approx(kernel, rel=1e-3)


def test_a_host_that_falls_behind_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(5e-5, 3e-6, delays=[0, 0, 0, 0.005])
    stream.patch(monkeypatch)
    assert DeviceClock(torch.device("cuda")).seconds(stream.candidate) == pytest.approx(3e-6, rel=1e-3)


@NO_CARD
@pytest.mark.gpu
def test_the_clock_of_a_card_tells_kernels_from_launches() -> None:
    small, large = torch.randn(64, 64, device="cuda"), torch.randn(4096, 4096, device="cuda")

    def many_launches() -> Tensor:
        for _ in range(8):
            small.add(1)
        return small

    found = DeviceClock(torch.device("cuda"))
    assert found.seconds(lambda: large @ large) > found.seconds(many_launches) > 0


# attention by products


@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "width"), [(2, 1, 50, 50, 512), (1, 3, 7, 33, 40)])
@pytest.mark.parametrize("most_scores", [1, 700, 1 << 20])
def test_attention_by_products(batch: int, heads: int, queries: int, keys: int, width: int, most_scores: int) -> None:
    q, k, v = (torch.randn(batch, heads, count, width) for count in (queries, keys, keys))
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(matmul_attention(q, k, v, most_scores=most_scores), wanted, atol=1e-5)
    half = matmul_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), most_scores=most_scores)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - wanted).norm() / wanted.norm()) < 0.02


def test_attention_by_products_of_slices_of_one_product() -> None:
    rows = torch.randn(2, 30, 3 * 64)
    q, k, v = (part[:, None] for part in rows.chunk(3, dim=2))
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(matmul_attention(q, k, v, most_scores=400), wanted, atol=1e-5)


def test_attention_by_products_never_takes_all_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, softmax = [], Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda rows, dim: largest.append(rows.numel()) or softmax(rows, dim))
    matmul_attention(*torch.randn(3, 1, 1, 128, 8), most_scores=1000)
    assert max(largest) <= 1000
    assert sum(largest) == 128 * 128


# convolutions of small maps


@pytest.fixture(scope="module")
def small() -> Any:
    pytest.importorskip("triton", reason="no Triton for this system")
    from fewstep.engines.cuda import small_conv

    return small_conv


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def laid(x: Tensor, like: torch.dtype, device: torch.device) -> Tensor:
    return x.to(device, like).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "outputs"), [((1, 80, 5, 7), 48), ((2, 64, 8, 8), 72), ((3, 16, 1, 1), 16), ((1, 136, 3, 9), 200)]
)
@pytest.mark.parametrize("tile", range(2))
def test_small_convolutions(
    small: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], outputs: int, tile: int
) -> None:
    x = laid(torch.randn(shape), dtype, device)
    weight = laid(torch.randn(outputs, shape[1], 3, 3) / (3 * shape[1] ** 0.5), dtype, device)
    bias = torch.randn(outputs).to(device, dtype)
    exact = dtype == torch.float32
    for more in (None, bias):
        found = small.small_conv(x, weight, more, small.TILES[tile])
        wanted = F.conv2d(x.float(), weight.float(), None if more is None else more.float(), padding=1)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(found.float(), wanted, atol=1e-5 if exact else 1e-2)


def test_which_maps_are_small(small: Any, device: torch.device) -> None:
    weight = laid(torch.randn(32, 64, 3, 3), torch.float16, device)
    counts = [
        len(small.small_conv_candidates(laid(torch.randn(shape), torch.float16, device), weight, None))
        for shape in [(1, 64, 8, 8), (2, 64, 8, 8), (1, 64, 16, 16), (1, 64, 64, 64)]
    ]
    assert counts == [2, 2, 0, 0]
    x = laid(torch.randn(1, 64, 8, 8), torch.float16, device)
    assert not small.small_conv_candidates(x.contiguous(), weight, None), "other layouts are the library's"
    assert not small.small_conv_candidates(x.float(), weight.float(), None)
    odd, filters = (laid(torch.randn(shape), torch.float16, device) for shape in [(1, 20, 8, 8), (32, 20, 3, 3)])
    assert not small.small_conv_candidates(odd, filters, None), "rows of filters would not be aligned"


class Last(Autotuner):
    """Runs the last candidate each time: never the library's."""

    def run(self, key: str, candidates: Any) -> Tensor:
        return list(candidates.values())[-1]()  # type: ignore[no-any-return]


def test_a_convolution_of_the_engine_takes_the_kernel_for_small_maps(small: Any, device: torch.device) -> None:
    from fewstep.engines.cuda.kernels import TritonOperations

    conv = nn.Conv2d(32, 48, 3, padding=1).to(device, torch.float16).requires_grad_(False)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    x, autotuner = laid(torch.randn(2, 32, 6, 5), torch.float16, device), Last()
    fast, plain = (
        CudaConv(conv, CudaLayerContext(operations=each, autotuner=autotuner)) for each in (TritonOperations(), PLAIN)
    )
    assert torch.allclose(fast(x), plain(x), atol=1e-2)
    assert torch.allclose(fast.bare(x), plain.bare(x), atol=1e-2)
    assert torch.allclose(fast(x) - fast.bare(x), conv.bias[:, None, None].expand_as(fast(x)), atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_few_outputs_are_padded_and_cut(small: Any, device: torch.device, bias: bool) -> None:
    from fewstep.engines.cuda.kernels import TritonOperations

    conv = nn.Conv2d(20, 3, 3, padding=1, bias=bias).to(device).requires_grad_(False)
    fast, x = (
        CudaConv(conv, CudaLayerContext(operations=TritonOperations(), autotuner=Last())),
        laid(torch.randn(2, 20, 5, 7), torch.float32, device),
    )
    for _ in range(2):
        assert fast(x).shape == (2, 3, 5, 7)
        assert torch.allclose(fast(x), conv(x), atol=1e-5)
        conv.weight.mul_(2)
        fast.ctx.refresh()


def test_doubling_takes_the_kernel_for_small_maps(small: Any, device: torch.device) -> None:
    conv = nn.Conv2d(32, 48, 3, padding=1).to(device, torch.float16).requires_grad_(False)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    from fewstep.engines.cuda.kernels import TritonOperations

    x, optimizations = laid(torch.randn(1, 32, 3, 4), torch.float16, device), CudaOptimizations(upsampled=False)
    ctx = CudaLayerContext(operations=TritonOperations(), autotuner=Last(), optimizations=optimizations)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias, padding=1)
    assert torch.allclose(UpsampleConv(conv, ctx)(x), wanted, atol=1e-2)


@pytest.mark.parametrize("option", [{"stride": 2, "padding": 1}, {"padding": 0}, {"padding": 1, "dilation": 2}])
def test_other_convolutions_are_the_librarys(small: Any, device: torch.device, option: dict[str, int]) -> None:
    from fewstep.engines.cuda.kernels import TritonOperations

    conv = nn.Conv2d(32, 48, 3, **option).to(device, torch.float16).requires_grad_(False)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    x = laid(torch.randn(1, 32, 6, 5), torch.float16, device)
    fast = CudaConv(conv, CudaLayerContext(operations=TritonOperations(), autotuner=Last()))
    assert torch.equal(fast(x), conv(x))


# products with their gate


@pytest.fixture(scope="module")
def gate() -> Any:
    pytest.importorskip("triton", reason="no Triton for this system")
    from fewstep.engines.cuda import geglu

    return geglu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels", "outputs"), [((2, 37), 80, 48), ((1, 300), 64, 136), ((1200,), 128, 24)])
@pytest.mark.parametrize("tile", range(2))
def test_products_with_their_gate(
    gate: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], channels: int, outputs: int, tile: int
) -> None:
    x = torch.randn(*shape, channels).to(device, dtype)
    weight = (torch.randn(2 * outputs, channels) / channels**0.5).to(device, dtype)
    bias = torch.randn(2 * outputs).to(device, dtype)
    exact = dtype == torch.float32
    for more in (None, bias):
        wanted = PLAIN.gated(F.linear(x.float(), weight.float(), None if more is None else more.float()))
        found = gate.geglu(x, weight, more, gate.TILES[tile])
        assert found.dtype == dtype
        assert torch.allclose(found.float(), wanted, atol=1e-5 if exact else 1e-2)


def test_a_transformer_takes_one_kernel_for_product_and_gate(gate: Any, device: torch.device) -> None:
    from fewstep.engines.cuda.kernels import TritonOperations

    layer = nn.Linear(64, 2 * 48).to(device, torch.float16).requires_grad_(False)
    rows, autotuner = torch.randn(2, 5, 64).to(device, torch.float16), Last()
    found = []
    for operations in (TritonOperations(), PLAIN):
        ctx = CudaLayerContext(operations=operations, autotuner=autotuner)
        found.append(fused_geglu(fused_linear(ctx, layer), rows, ctx))
    assert torch.allclose(*found, atol=1e-2)
    assert not gate.geglu_candidates(rows.float(), layer.weight.float(), None)


# on a card, at the sizes of real models


@NO_CARD
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "side", "inputs"), [(1, 8, 1280), (2, 8, 2560)])
def test_small_convolutions_on_a_card(small: Any, dtype: torch.dtype, batch: int, side: int, inputs: int) -> None:
    device = torch.device("cuda")
    x = laid(torch.randn(batch, inputs, side, side), dtype, device)
    weight = laid(torch.randn(1280, inputs, 3, 3) / (3 * inputs**0.5), dtype, device)
    wanted = F.conv2d(x.float().cpu(), weight.float().cpu(), padding=1)
    found = small.small_conv_candidates(x, weight, None)
    assert len(found) == 2
    assert {name: error(candidate(), wanted) < 0.01 for name, candidate in found.items()} == dict.fromkeys(found, True)
    assert all(torch.equal(candidate(), candidate()) for candidate in found.values()), "the order of sums is fixed"


@NO_CARD
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_attention_and_gates_on_a_card(gate: Any, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 1, 1024, 512).to("cuda", dtype)
    wanted = F.scaled_dot_product_attention(q.float().cpu(), k.float().cpu(), v.float().cpu())
    assert error(matmul_attention(q, k, v, most_scores=1 << 20), wanted) < 0.01
    x, weight = torch.randn(500, 640).to("cuda", dtype), (torch.randn(2 * 2560, 640) / 25).to("cuda", dtype)
    wanted = PLAIN.gated(F.linear(x.float().cpu(), weight.float().cpu()))
    found = gate.geglu_candidates(x, weight, None)
    assert {name: error(candidate(), wanted) < 0.01 for name, candidate in found.items()} == dict.fromkeys(found, True)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the size of what is wanted."""
    return float((found.float().cpu() - wanted).norm() / wanted.norm())
