"""The same operations as kernels in Triton, each of which passes over its rows once; norms over groups are in norms.py.

Half-precision maps are widened as they are read. No sum depends on the order in which programs run: a picture is the
same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cuda.norms import FEW_PIXELS, GroupNorm, added_with_moments
from fewstep.engines.cuda.operations import Moments

TILE = 2048
"""Numbers of a tile, about."""

MANY_ROWS = 1024
"""From here on a program norms several short rows: fewer would leave multiprocessors idle."""


@triton.jit
def _row_norm(  # type: ignore[no-untyped-def]
    x, h, offset, weight, bias, total, out, rows, channels, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The norms of ROWS rows of x + h + offset, and the sums x + h themselves in the format of x."""
    first, c = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, COLUMNS)
    r, known = tl.arange(0, ROWS), c < channels
    there = (r < rows - first)[:, None] & known[None, :]
    at = first * channels + r[:, None] * channels + c[None, :]
    row = tl.load(x + at, mask=there, other=0).to(tl.float32)
    if h is not None:
        added = (row + tl.load(h + at, mask=there, other=0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + at, added, mask=there)
        row = added.to(tl.float32)
    if offset is not None:
        row += tl.load(offset + c, mask=known, other=0).to(tl.float32)[None, :]
    mean = tl.sum(row, 1) / channels
    centred = tl.where(there, row - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)
    scale = tl.load(weight + c, mask=known, other=0).to(tl.float32)
    shift = tl.load(bias + c, mask=known, other=0).to(tl.float32)
    y = centred * inverse[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated(rows, out, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Value times GELU of the gate, the exact one."""
    first, r = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (r < count - first)[:, None] & (c < channels)[None, :]
    source = rows + first * 2 * channels + (r * 2 * channels)[:, None] + c[None, :]
    value = tl.load(source, mask=there, other=0).to(tl.float32)
    gate = tl.load(source + channels, mask=there, other=0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    at = first * channels + (r * channels)[:, None] + c[None, :]
    tl.store(out + at, (value * gelu).to(out.dtype.element_ty), mask=there)


@triton.jit
def _added(x, bias, residual, out, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    first, r = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < channels
    there = (r < count - first)[:, None] & known[None, :]
    at = first * channels + (r * channels)[:, None] + c[None, :]
    total = tl.load(x + at, mask=there, other=0).to(tl.float32)
    total += tl.load(residual + at, mask=there, other=0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=known, other=0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _weave(  # type: ignore[no-untyped-def]
    phases, bias, out, height, width, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS pixels of the doubled map: each from the phase of its place, and with the bias."""
    batch, p = tl.program_id(2), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < channels
    y, x = p // (2 * width), p % (2 * width)
    there = (y < 2 * height)[:, None] & known[None, :]
    pixel = (batch.to(tl.int64) * (height + 1) + (y + 1) // 2) * (width + 1) + (x + 1) // 2
    source = (pixel * 4 + y % 2 * 2 + x % 2) * channels
    v = tl.load(phases + source[:, None] + c[None, :], mask=there, other=0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + c, mask=known, other=0).to(tl.float32)[None, :]
    target = (batch.to(tl.int64) * 4 * height * width + p) * channels
    tl.store(out + target[:, None] + c[None, :], v.to(out.dtype.element_ty), mask=there)


class TritonOperations:
    """See `Operations`; on a card, or in Triton's interpreter.

    `autotuner` finds the fastest candidate for each norm over groups; without them the size of the map decides.
    """

    def __init__(self, autotuner: Autotuner | None = None) -> None:
        self.autotuner = autotuner

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        added: Tensor | None = None,
        *,
        silu: bool = True,
        moments: Moments | None = None,
    ) -> Tensor:
        """See `Operations`."""
        call = GroupNorm(x.contiguous(), norm, added, silu, moments)
        candidates = call.candidates()
        if self.autotuner is None:
            return next(iter(candidates.values()))()
        return self.autotuner.run(call.key(), candidates)

    def add_norm(self, x: Tensor, h: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        return self._normed(x, h, None, norm)

    def row_norm(self, x: Tensor, offset: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """See `Operations`."""
        return self._normed(x, None, offset, norm)[1]

    def _normed(self, x: Tensor, h: Tensor | None, offset: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        x, h = x.contiguous(), None if h is None else h.contiguous()
        channels, out = x.shape[-1], torch.empty_like(x)
        total = x if h is None else torch.empty_like(x)
        count, columns = x.numel() // channels, triton.next_power_of_2(channels)
        rows = max(1, TILE // columns) if count >= MANY_ROWS else 1
        _row_norm[(triton.cdiv(count, rows),)](
            *(x, h, offset, norm.weight, norm.bias, total, out, count, channels, norm.eps),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
        return total, out

    def gated(self, rows: Tensor) -> Tensor:
        """See `Operations`."""
        rows, channels = rows.contiguous(), rows.shape[-1] // 2
        out = torch.empty(*rows.shape[:-1], channels, dtype=rows.dtype, device=rows.device)
        grid, tile = _tiles(out.numel() // channels, channels)
        _gated[grid](rows, out, out.numel() // channels, channels, **tile)
        return out

    def added(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """See `Operations`."""
        x, residual, channels = x.contiguous(), residual.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        grid, tile = _tiles(out.numel() // channels, channels)
        _added[grid](x, bias, residual, out, out.numel() // channels, channels, **tile)
        return out

    def added_moments(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Moments | None]:
        """See `Operations`. Small maps are normed by one kernel, which needs no moments."""
        if x.shape[1] <= FEW_PIXELS:
            return self.added(x, bias, residual), None
        return added_with_moments(x.contiguous(), bias, residual.contiguous())

    def weave(self, phases: Tensor, bias: Tensor | None) -> Tensor:
        """See `Operations`."""
        rows = phases.permute(0, 2, 3, 1).contiguous()
        batch, height, width, channels = (rows.shape[0], rows.shape[1] - 1, rows.shape[2] - 1, rows.shape[3] // 4)
        out = torch.empty(batch, 2 * height, 2 * width, channels, dtype=rows.dtype, device=rows.device)
        grid, tile = _tiles(4 * height * width, channels)
        _weave[(*grid, batch)](rows, bias, out, height, width, channels, **tile)
        return out.permute(0, 3, 1, 2)


def _tiles(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """A grid of tiles over (rows, channels), and their sizes: powers of two, without waste where these divide."""
    dividing = min(256, channels & -channels)
    columns = dividing if dividing >= 32 else min(64, triton.next_power_of_2(channels))
    height = TILE // columns
    grid = triton.cdiv(rows, height), triton.cdiv(channels, columns)
    return grid, {"ROWS": height, "COLUMNS": columns, "num_warps": 4}
