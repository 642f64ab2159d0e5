"""The kernels for NVIDIA cards, on one or else in Triton's interpreter, beside PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.engines.cuda.operations import PlainOperations

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("pixels", "channels", "groups"), [(7, 32, 8), (300, 96, 32), (4096, 40, 4), (64, 2560, 32)])
@pytest.mark.parametrize("added", [None, 1, 2])
def test_norms_over_groups(
    kernels: Any, dtype: torch.dtype, pixels: int, channels: int, groups: int, added: int | None
) -> None:
    x, layer = (torch.randn(2, pixels, channels) + 1).to(dtype), norm(nn.GroupNorm, groups, channels).to(dtype)
    more = None if added is None else torch.randn(added, channels).to(dtype)
    for silu in (True, False):
        assert close(kernels.group_norm(x, layer, more, silu=silu), PLAIN.group_norm(x, layer, more, silu=silu))


def test_a_number_of_groups_that_no_tile_has(kernels: Any) -> None:
    x, layer = torch.randn(1, 20, 36), norm(nn.GroupNorm, 6, 36)
    assert close(kernels.group_norm(x, layer), PLAIN.group_norm(x, layer))


def test_a_slice_of_what_is_added_for_many_blocks(kernels: Any) -> None:
    x, layer, all_of_it = torch.randn(2, 30, 32), norm(nn.GroupNorm, 8, 32), torch.randn(2, 100)
    assert close(kernels.group_norm(x, layer, all_of_it[:, 40:72]), PLAIN.group_norm(x, layer, all_of_it[:, 40:72]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [40, 320, 1280])
def test_norms_of_rows(kernels: Any, dtype: torch.dtype, channels: int) -> None:
    x, h = (torch.randn(2, 5, channels).to(dtype) for _ in range(2))
    layer = norm(nn.LayerNorm, channels).to(dtype)
    for more in (h, None):
        for found, wanted in zip(kernels.add_norm(x, more, layer), PLAIN.add_norm(x, more, layer), strict=True):
            assert close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates_and_additions(kernels: Any, dtype: torch.dtype) -> None:
    rows, residual, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 7, 96), (3, 7, 96), (96,)))
    assert close(kernels.gated(rows), PLAIN.gated(rows))
    assert close(kernels.added(rows, bias, residual), PLAIN.added(rows, bias, residual))
    assert close(kernels.added(rows, None, residual), PLAIN.added(rows, None, residual))
