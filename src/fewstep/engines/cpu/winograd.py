"""3x3 convolutions on CPUs with fewer products, exact up to rounding, out of plain tensor operations.

Two minimal-filtering schemes (arXiv:1509.09308) for stride 1 and a zero border of 1:

- `WINOGRAD`: F(4x4, 3x3), 36 products for each 4x4 outputs where the definition takes 144;
- `STRICT`: F(2x2, 3x3), 16 products for each 2x2 outputs where it takes 36, with smaller rounding errors than its own;
- `UPSAMPLED`: the convolution of a nearest-neighbour 2x enlargement that is never built, 25 products for 4x4 outputs.

Tensors have the shape (B, C, H, W) and lie in memory as channels last, so that every slice taken below runs over
contiguous channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.engines.cpu.scratch import scratch

CHUNK_BYTES = 8 << 20
"""Of transformed input at a time: what fits into a third of a last-level cache."""

Activation = Callable[[slice, Tensor, Tensor], object]
"""Maps rows (b, h, W, C) of some of the input's pictures on their way in, into the last tensor."""

Products = Callable[[Tensor, Tensor, Tensor], None]
"""Multiplies (P, N, C) with (P, O, C) into (P, N, O)."""

_Copy = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Scheme:
    """A convolution in one dimension, `outputs` at a time; pictures nest it both ways."""

    step: int  # input samples from one tile to the next
    outputs: int
    filter_transform: tuple[tuple[float, float, float], ...]  # rows: a product's weights of the three taps
    input_transform: Callable[[Sequence[Tensor], Sequence[Tensor]], None]
    output_transform: Callable[[Sequence[Tensor], Sequence[Tensor]], None]

    @property
    def samples(self) -> int:
        """Input samples that a tile looks at."""
        return self.step + 2


def transformed_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """Filters (O, C, 3, 3) as the matrices (36, 16 or 25, O, C) of the scheme's products."""
    matrix = torch.tensor(scheme.filter_transform, dtype=torch.float64)
    flat = weight.detach().permute(2, 3, 0, 1).reshape(9, -1)
    return (torch.kron(matrix, matrix).to(weight.dtype) @ flat).view(-1, *weight.shape[:2])


def products_by_torch(transformed: Tensor, weight: Tensor, out: Tensor) -> None:
    """transformed (P, N, C) times weight (P, O, C), into out (P, N, O): by the BLAS that PyTorch takes."""
    torch.bmm(transformed, weight.mT, out=out)


def products_by_onednn(transformed: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same by oneDNN, which is twice as fast where PyTorch's BLAS does not use what the processor has."""
    for rows, matrix, target in zip(transformed, weight, out, strict=True):
        target.copy_(torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], ""))


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    *,
    products: Products = products_by_torch,
    activate: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution of x (B, C, H, W) with `transformed_weight`s: (B, O, H, W), or twice as large with `UPSAMPLED`.

    `activate` maps the input on its way in; the border stays 0. `residual`, of the output's shape, is added to it.
    """
    (batch, channels, height, width), out_channels = x.shape, weight.shape[1]
    down, across, scale = -(-height // scheme.step), -(-width // scheme.step), scheme.outputs // scheme.step
    shape = (batch, out_channels, height * scale, width * scale)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    source, target = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    extra = None if residual is None else residual.permute(0, 2, 3, 1)
    rows = max(1, CHUNK_BYTES // (x.element_size() * len(weight) * channels * across))  # of tiles, at a time
    pictures = max(1, rows // down)
    for first in range(0, batch, pictures):
        for top in range(0, down, rows):
            tiles = _Tiles(top, min(top + rows, down), across)
            part = slice(first, first + pictures), slice(scheme.outputs * top, scheme.outputs * tiles.last)
            on_rows = None if activate is None else partial(activate, part[0])
            y = _convolved(_window(source[part[0]], tiles, scheme, on_rows), tiles, weight, bias, scheme, products)
            y = y[:, : target[part].shape[1], : target.shape[2]]
            if extra is None:
                target[part].copy_(y)
            else:
                torch.add(y, extra[part], out=target[part])
    return out


@dataclass(frozen=True)
class _Tiles:
    """Rows of tiles from `top` to below `last`, `across` in each."""

    top: int
    last: int
    across: int

    @property
    def down(self) -> int:
        return self.last - self.top


def _convolved(
    window: Tensor, tiles: _Tiles, weight: Tensor, bias: Tensor | None, scheme: Scheme, products: Products
) -> Tensor:
    """The outputs (B, h, w, O) of some rows of tiles, for what they look at (B, H, W, C)."""
    (batch, *_, channels), points, out_channels = window.shape, len(scheme.filter_transform), weight.shape[1]
    grid = (batch, tiles.down, tiles.across)
    half = scratch("half", (points, batch, tiles.down, *window.shape[2:]))
    scheme.input_transform(_samples(window, 1, scheme, tiles.down), half.unbind())
    transformed = scratch("transformed", (points, points, *grid, channels))
    scheme.input_transform(_samples(half, 3, scheme, tiles.across), transformed.unbind(1))
    made = scratch("products", (points, points, *grid, out_channels))
    products(transformed.view(points**2, -1, channels), weight, made.view(points**2, -1, out_channels))
    if bias is not None:
        made[1, 1].add_(bias)  # the product that counts once in every output
    size = scheme.outputs
    half = scratch("half", (size, points, *grid, out_channels))
    scheme.output_transform(made.unbind(), half.unbind())
    y = scratch("outputs", (batch, tiles.down, size, tiles.across, size, out_channels))
    scheme.output_transform(half.unbind(1), y.permute(2, 4, 0, 1, 3, 5).unbind(1))
    return y.view(batch, size * tiles.down, size * tiles.across, out_channels)


def _window(x: Tensor, tiles: _Tiles, scheme: Scheme, activate: _Copy | None) -> Tensor:
    """What the tiles look at of x (B, H, W, C), with zeros where that lies outside."""
    batch, height, width, channels = x.shape
    step, down = scheme.step, tiles.down
    window = scratch("window", (batch, down * step + 2, tiles.across * step + 2, channels))
    first, lead = tiles.top * step - 1, int(tiles.top == 0)
    valid = min(tiles.last * step + 1, height) - first
    for border in (window[:, :lead], window[:, valid:], window[:, :, :1], window[:, :, width + 1 :]):
        border.zero_()
    inside, rows = window[:, lead:valid, 1 : width + 1], x[:, first + lead : first + valid]
    if activate is None:
        inside.copy_(rows)
    else:
        activate(rows, inside)
    return window


def _samples(x: Tensor, dim: int, scheme: Scheme, tiles: int) -> list[Tensor]:
    """Sample i of every tile along `dim`, for each i."""
    span = (tiles - 1) * scheme.step + 1
    return [x[(slice(None),) * dim + (slice(i, i + span, scheme.step),)] for i in range(scheme.samples)]


def _input_4(x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Six neighbouring samples to the points 0, 1, -1, 2, -2 and infinity."""
    even = torch.sub(x[4], x[2], out=out[0])
    odd = torch.sub(x[3], x[1], out=out[5])
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(x[4], x[2], alpha=4, out=even)
    torch.sub(x[3], x[1], alpha=4, out=odd)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(x[4], x[2], alpha=5, out=out[0]).add_(x[0], alpha=4)
    torch.sub(x[5], x[3], alpha=5, out=out[5]).add_(x[1], alpha=4)


def _output_4(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Products at the six points to four neighbouring outputs; overwrites `m`."""
    odd = torch.sub(m[1], m[2], out=scratch("spare", m[1].shape))
    even = m[1].add_(m[2])
    odd2 = torch.sub(m[3], m[4], out=m[2])
    even2 = m[3].add_(m[4])
    torch.add(odd, odd2, alpha=2, out=out[1])
    torch.add(even, even2, alpha=4, out=out[2])
    torch.add(m[0], even.add_(even2), out=out[0])
    torch.add(m[5], odd.add_(odd2, alpha=8), out=out[3])


def _input_2(x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Four neighbouring samples to the points 0, 1, -1 and infinity."""
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    torch.sub(x[3], x[1], out=out[3])


def _output_2(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Products at the four points to two neighbouring outputs; overwrites `m`."""
    odd = torch.sub(m[1], m[2], out=scratch("spare", m[1].shape))
    torch.add(m[0], m[1].add_(m[2]), out=out[0])
    torch.add(m[3], odd, out=out[1])


def _input_upsampled(x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Four samples, the inner two of which lie, enlarged, under the four outputs."""
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    out[3].copy_(out[2])
    torch.sub(x[3], x[1], out=out[4])


def _output_upsampled(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    low = torch.sub(m[1], m[2], out=scratch("spare", m[1].shape))
    high = m[1].add_(m[2])
    torch.add(low, m[3], out=out[1])
    torch.add(high, m[3], out=out[2])
    torch.add(m[0], low.sub_(m[3]), out=out[0])
    torch.add(m[4], high.sub_(m[3]), out=out[3])


_FILTER_4 = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
_FILTER_2 = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_FILTER_UPSAMPLED = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.0, 0.5, 0.0), (-0.5, 0.0, 0.5), (0.0, 0.0, 1.0))

WINOGRAD = Scheme(4, 4, _FILTER_4, _input_4, _output_4)
STRICT = Scheme(2, 2, _FILTER_2, _input_2, _output_2)
UPSAMPLED = Scheme(2, 4, _FILTER_UPSAMPLED, _input_upsampled, _output_upsampled)
