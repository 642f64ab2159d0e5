"""The kernels for NVIDIA cards, on one or else in Triton's interpreter, beside PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.engines.cuda.operations import PlainOperations, moments_of, with_moments
from fewstep.nn.resblock import ResBlock

pytest.importorskip("triton", reason="no Triton for this system")

PLAIN = PlainOperations()


@pytest.fixture(autouse=True)
def device() -> Any:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as device:
        yield device


@pytest.fixture(scope="module")
def kernels() -> Any:
    from fewstep.engines.cuda.kernels import TritonOperations

    return TritonOperations()


def norm(kind: type[nn.Module], *sizes: int) -> Any:
    layer = kind(*sizes)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn_like(weight))
    return layer.requires_grad_(False)


def close(found: Tensor, wanted: Tensor) -> bool:
    exact = wanted.dtype == torch.float32
    return torch.allclose(found.float(), wanted.float(), atol=2e-5 if exact else 3e-2, rtol=1e-5 if exact else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("pixels", "channels", "groups"), [(7, 32, 8), (300, 96, 32), (130, 40, 4), (64, 640, 32)])
@pytest.mark.parametrize("added", [None, 1, 2])
def test_norms_over_groups(
    kernels: Any, dtype: torch.dtype, pixels: int, channels: int, groups: int, added: int | None
) -> None:
    x, layer = (torch.randn(2, pixels, channels) + 1).to(dtype), norm(nn.GroupNorm, groups, channels).to(dtype)
    more = None if added is None else torch.randn(added, channels).to(dtype)
    silu = added != 1
    assert close(kernels.group_norm(x, layer, more, silu=silu), PLAIN.group_norm(x, layer, more, silu=silu))


@pytest.mark.parametrize(
    ("pixels", "channels", "groups"),
    [(1, 8, 2), (33, 36, 6), (40, 77, 7), (50, 24, 3), (70, 130, 1), (19, 12, 12), (600, 30, 5)],
)
def test_all_candidates_for_a_norm_compute_the_same(kernels: Any, pixels: int, channels: int, groups: int) -> None:
    from fewstep.engines.cuda.norms import GroupNorm

    layer, more = norm(nn.GroupNorm, groups, channels), torch.randn(2, 3 * channels)[:, channels : 2 * channels]
    x, around = inside(2, pixels, channels)
    candidates = GroupNorm(x, layer, more, True).candidates()
    assert len(candidates) == 3
    for name, run in candidates.items():
        assert close(run(), PLAIN.group_norm(x, layer, more)), name
    assert bool(around.isnan().all())


def inside(*shape: int) -> tuple[Tensor, Tensor]:
    """Random numbers, and the NaNs that lie before and behind them in memory: whoever reads these shows it."""
    numbers = torch.randn(shape)
    around = torch.full((2, numbers.numel()), torch.nan)
    memory = torch.cat([around[0], numbers.flatten(), around[1]])
    middle = memory[numbers.numel() : 2 * numbers.numel()].view(shape)
    return middle, memory.view(3, -1)[::2]


def test_large_maps_have_no_candidate_that_gives_a_group_to_one_multiprocessor(kernels: Any) -> None:
    from fewstep.engines.cuda.norms import GroupNorm

    x, layer = torch.empty(1, 1, 512).expand(1, 65536, 512), norm(nn.GroupNorm, 32, 512)
    assert [name.split()[0] for name in GroupNorm(x, layer, None, True).candidates()] == ["passes"] * 2


@pytest.mark.parametrize("mean", [30.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_digits(kernels: Any, mean: float) -> None:
    from fewstep.engines.cuda.norms import GroupNorm

    x, layer = torch.randn(1, 700, 16) + mean, norm(nn.GroupNorm, 4, 16)
    wanted = PLAIN.group_norm(x.double(), norm_in_double(layer), None, silu=False)
    for name, run in GroupNorm(x, layer, None, False).candidates().items():
        assert float((run() - wanted).abs().max()) < 6e-7 * mean + 5e-6, name


def norm_in_double(layer: nn.GroupNorm) -> nn.GroupNorm:
    double = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, dtype=torch.float64)
    double.load_state_dict(layer.state_dict())
    return double.requires_grad_(False)


def test_a_constant_map_has_no_deviation(kernels: Any) -> None:
    from fewstep.engines.cuda.norms import GroupNorm

    x, layer = torch.full((1, 100, 8), 777.7), norm(nn.GroupNorm, 2, 8)
    for run in GroupNorm(x, layer, None, False).candidates().values():
        assert torch.allclose(run(), layer.bias.expand(1, 100, 8), atol=0.05)


def test_choices_find_the_candidate_of_each_norm() -> None:
    from fewstep.engines.autotune import Autotuner
    from fewstep.engines.cuda.kernels import TritonOperations

    autotuner = Autotuner()
    x, layer = torch.randn(1, 16, 32), norm(nn.GroupNorm, 8, 32)
    assert close(TritonOperations(autotuner).group_norm(x, layer), PLAIN.group_norm(x, layer))
    (key,) = autotuner.known
    autotuner.known[key] = "passes 64x64"
    assert close(TritonOperations(autotuner).group_norm(x, layer), PLAIN.group_norm(x, layer))
    TritonOperations(autotuner).group_norm(x, layer, silu=False)
    assert len(autotuner.known) == 2, "another norm is another choice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("pixels", "channels"), [(1100, 12), (1025, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_addition_finds_the_moments_that_the_next_norm_needs(
    kernels: Any, dtype: torch.dtype, pixels: int, channels: int, bias: bool
) -> None:
    x, residual = (inside(2, pixels, channels)[0].to(dtype) + 3 for _ in range(2))
    more, layer = torch.randn(channels).to(dtype) if bias else None, norm(nn.GroupNorm, 4, channels).to(dtype)
    total, moments = kernels.added_moments(x, more, residual)
    assert close(total, PLAIN.added(x, more, residual))
    assert close(kernels.group_norm(total, layer, moments=moments), PLAIN.group_norm(total, layer))
    means, deviations = moments.values.unbind(2)
    counts = torch.tensor([min(moments.rows, pixels - first) for first in range(0, pixels, moments.rows)])
    assert torch.allclose((means * counts[:, None]).sum(1), total.float().sum(1), rtol=1e-4, atol=0.2)
    assert torch.allclose(
        deviations[:, 0], total[:, : moments.rows].float().var(1, correction=0) * counts[0], rtol=1e-3
    )


def test_moments_do_not_outlive_a_change_of_the_map(kernels: Any) -> None:
    x, moments = kernels.added_moments(torch.randn(1, 1030, 8), None, torch.randn(1, 1030, 8))
    x = with_moments(x, moments)
    assert moments_of(x) is moments
    assert moments_of(2 * x) is None
    assert moments_of(torch.cat([x, x])) is None
    x += 1
    assert moments_of(x) is None


def test_a_residual_block_hands_the_moments_of_its_map_to_the_next(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.engines.autotune import Autotuner
    from fewstep.engines.cuda import norms
    from fewstep.engines.cuda.context import CudaLayerContext
    from fewstep.engines.cuda.layers import CudaResBlock

    passes, run = [], norms.moments_by
    monkeypatch.setattr(norms, "moments_by", lambda *given: passes.append(given) or run(*given))
    ctx = CudaLayerContext(operations=kernels, autotuner=Autotuner())
    blocks = [ResBlock(8, 16, groups=4).requires_grad_(False), ResBlock(16, 16, groups=4).requires_grad_(False)]
    fast = [CudaResBlock(block, ctx) for block in blocks]
    x = torch.randn(1, 8, 40, 27).contiguous(memory_format=torch.channels_last)
    assert torch.allclose(fast[1](fast[0](x)), blocks[1](blocks[0](x)), atol=1e-4)
    assert len(passes) == 3, "four norms, the third of which is spared a pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [40, 320, 1280])
def test_norms_of_rows(kernels: Any, dtype: torch.dtype, channels: int) -> None:
    x, h = (torch.randn(2, 5, channels).to(dtype) for _ in range(2))
    layer = norm(nn.LayerNorm, channels).to(dtype)
    for more in (h, None):
        for found, wanted in zip(kernels.add_norm(x, more, layer), PLAIN.add_norm(x, more, layer), strict=True):
            assert close(found, wanted)
    for offset in (h[0, 0], None):
        assert close(kernels.row_norm(x, offset, layer), PLAIN.row_norm(x, offset, layer))


def test_norms_of_many_short_rows(kernels: Any) -> None:
    (x, _), layer = inside(1, 1027, 24), norm(nn.LayerNorm, 24)
    assert close(kernels.add_norm(x, x, layer)[1], PLAIN.add_norm(x, x, layer)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [96, 10, 256])
def test_gates_and_additions(kernels: Any, dtype: torch.dtype, channels: int) -> None:
    shapes = ((3, 7, channels), (3, 7, channels), (channels,))
    rows, residual, bias = (torch.randn(*shape).to(dtype) for shape in shapes)
    assert close(kernels.gated(rows), PLAIN.gated(rows))
    assert close(kernels.added(rows, bias, residual), PLAIN.added(rows, bias, residual))
    assert close(kernels.added(rows, None, residual), PLAIN.added(rows, None, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 3), (5, 3, 64), (8, 9, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_weaving_the_phases_of_a_doubled_map(
    kernels: Any, dtype: torch.dtype, height: int, width: int, channels: int, bias: bool
) -> None:
    phases = inside(2, 4 * channels, height + 1, width + 1)[0].to(dtype).contiguous(memory_format=torch.channels_last)
    more = torch.randn(channels).to(dtype) if bias else None
    found, wanted = kernels.weave(phases, more), PLAIN.weave(phases, more)
    assert found.shape == wanted.shape == (2, channels, 2 * height, 2 * width)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert close(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")
@pytest.mark.parametrize(
    ("batch", "pixels", "channels"),
    [(1, 4096, 320), (2, 1024, 960), (1, 256, 2560), (8, 64, 1280), (1, 65536, 512), (1, 262144, 128)],
)
def test_norms_at_the_sizes_of_real_models(kernels: Any, batch: int, pixels: int, channels: int) -> None:
    from fewstep.engines.cuda.norms import GroupNorm, added_with_moments

    x, residual = ((torch.randn(batch, pixels, channels) + 3 * torch.randn(channels)).half() for _ in range(2))
    layer, more = norm(nn.GroupNorm, 32, channels).half(), torch.randn(batch, channels).half()
    wanted = PLAIN.group_norm(x.float(), norm_in_double(layer).float(), more.float())
    for name, run in GroupNorm(x, layer, more).candidates().items():
        assert close(run(), wanted.half()), name
    total, moments = added_with_moments(x, more[0], residual)
    assert close(total, PLAIN.added(x.float(), more[0].float(), residual.float()).half())
    assert close(kernels.group_norm(total, layer, moments=moments), PLAIN.group_norm(total, layer))
