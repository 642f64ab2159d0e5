"""What the engine for NVIDIA cards is made of, as far as a CPU can run it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cuda.context import CudaLayerContext, PackedWeight
from fewstep.engines.cuda.graphs import Given, Graphs
from fewstep.engines.cuda.layers import UpsampleConv
from fewstep.engines.cuda.memory import tiled
from fewstep.engines.cuda.operations import PlainOperations


class Counted:
    """A recorded function that is called, and how many were recorded."""

    made = 0

    def __init__(self, function: object, given: Given) -> None:
        self.function = function
        Counted.made += 1

    def replay(self, given: Given) -> Sequence[Tensor | None]:
        return self.function(*given)  # type: ignore[operator]


def test_a_graph_is_recorded_once_for_each_shape_and_the_oldest_goes_first() -> None:
    graphs, Counted.made = Graphs(Counted, most=2), 0
    for size in (1, 1, 2, 1, 3, 1):  # 2 is the one that was not used for the longest
        assert graphs.run("double", lambda x: (2 * x,), torch.ones(size))[0].sum() == 2 * size
    assert (Counted.made, len(graphs)) == (3, 2)
    graphs.run("double", lambda x: (2 * x,), torch.ones(2))
    graphs.run("double", lambda x: (2 * x,), torch.ones(2).half())
    graphs.run("half", lambda x: (x / 2,), torch.ones(2))
    assert Counted.made == 6


def test_what_is_made_of_weights_stays_where_it_is() -> None:
    weight = nn.Parameter(torch.ones(3))
    double = PackedWeight(lambda: [weight], lambda: 2 * weight.detach())
    place = double.value.data_ptr()
    with torch.no_grad():
        weight.add_(1)
    double.refresh()
    assert double.value.tolist() == [4, 4, 4]
    assert double.value.data_ptr() == place


@pytest.mark.parametrize("size", [(1, 1), (4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_doubling_in_four_small_convolutions(size: tuple[int, int], bias: bool) -> None:
    conv = nn.Conv2d(6, 5, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(2, 6, *size)
    fast = UpsampleConv(conv, CudaLayerContext(operations=PlainOperations(), autotuner=Autotuner()))
    assert torch.allclose(fast(x), conv(F.interpolate(x, scale_factor=2.0)), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (40, 64), (33, 17)])
def test_tiles_cover_a_picture_without_seams(size: tuple[int, int]) -> None:
    latents = torch.randn(1, 4, *size)

    def decode(rows: Tensor) -> Tensor:
        assert max(rows.shape[2:]) <= 16
        return F.interpolate(rows[:, :3], scale_factor=8.0)

    found = tiled(decode, latents, tile=16, overlap=4)
    assert torch.allclose(found, F.interpolate(latents[:, :3], scale_factor=8.0), atol=1e-5)
