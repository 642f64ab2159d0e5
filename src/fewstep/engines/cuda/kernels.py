"""The same operations as kernels in Triton, each of which passes over its map once (the norm over groups twice).

Half-precision maps are widened as they are read. No sum depends on the order in which programs run: a picture is the
same each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fewstep.engines.cuda.operations import PlainOperations

PROGRAMS = 256
"""Pieces of a map that are summed on their own, at most: two for each multiprocessor of the largest cards."""

ROWS = 8192
"""Numbers of a tile, about."""


@triton.jit
def _group_tile(  # type: ignore[no-untyped-def]
    x, added, batch, first, last, pixels, channels, width,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows [first, last) of a picture as (BLOCK, GROUPS, WIDTH) in float32, where they lie and which are there."""
    rows = first + tl.arange(0, BLOCK)[:, None, None]
    inner = tl.arange(0, WIDTH)[None, None, :]
    channel = tl.arange(0, GROUPS)[None, :, None] * width + inner
    there = (rows < last) & (inner < width)
    at = (batch * pixels + rows).to(tl.int64) * channels + channel
    tile = tl.load(x + at, mask=there, other=0).to(tl.float32)
    if added is not None:
        tile += tl.load(added + channel, mask=inner < width, other=0).to(tl.float32)
        tile = tl.where(there, tile, 0.0)
    return tile, at, channel, there


@triton.jit
def _group_sums(  # type: ignore[no-untyped-def]
    x, added, sums, added_stride, pixels, channels, width, rows,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum and sum of squares of each group over one piece of a picture: sums (B, pieces, 2, GROUPS)."""
    piece, batch, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if added is not None:
        added += batch * added_stride
    total = tl.zeros((GROUPS,), tl.float32)
    squares = tl.zeros((GROUPS,), tl.float32)
    last = min((piece + 1) * rows, pixels)
    for first in range(piece * rows, last, BLOCK):
        tile, _, _, _ = _group_tile(x, added, batch, first, last, pixels, channels, width, BLOCK, GROUPS, WIDTH)
        total += tl.sum(tl.sum(tile, 2), 0)
        squares += tl.sum(tl.sum(tile * tile, 2), 0)
    out = sums + (batch * pieces + piece) * 2 * GROUPS + tl.arange(0, GROUPS)
    tl.store(out, total)
    tl.store(out + GROUPS, squares)


@triton.jit
def _group_apply(  # type: ignore[no-untyped-def]
    x, added, sums, weight, bias, out, added_stride, pixels, channels, width, rows, eps,
    SILU: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The norm, by the sums of all pieces, of one piece of a picture."""
    piece, batch, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if added is not None:
        added += batch * added_stride
    each, group = tl.arange(0, PIECES)[:, None], tl.arange(0, GROUPS)[None, :]
    at = sums + (batch * pieces + each) * 2 * GROUPS + group
    count = pixels * width
    mean = tl.sum(tl.load(at, mask=each < pieces, other=0), 0) / count
    square = tl.sum(tl.load(at + GROUPS, mask=each < pieces, other=0), 0) / count
    inverse = tl.rsqrt(tl.maximum(square - mean * mean, 0) + eps)
    last = min((piece + 1) * rows, pixels)
    for first in range(piece * rows, last, BLOCK):
        tile, place, channel, there = _group_tile(
            x, added, batch, first, last, pixels, channels, width, BLOCK, GROUPS, WIDTH
        )
        known = channel < channels
        scale = tl.load(weight + channel, mask=known, other=0).to(tl.float32)
        shift = tl.load(bias + channel, mask=known, other=0).to(tl.float32)
        y = (tile - mean[None, :, None]) * inverse[None, :, None] * scale + shift
        if SILU:
            y = y / (1 + tl.exp(-y))
        tl.store(out + place, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _row_norm(  # type: ignore[no-untyped-def]
    x, h, weight, bias, total, out, channels, eps, WIDTH: tl.constexpr
):
    """The norm of one row of x + h, and the sum itself in the format of x."""
    channel = tl.arange(0, WIDTH)
    there = channel < channels
    at = tl.program_id(0).to(tl.int64) * channels + channel
    row = tl.load(x + at, mask=there, other=0).to(tl.float32)
    if h is not None:
        row = (row + tl.load(h + at, mask=there, other=0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + at, row, mask=there)
        row = row.to(tl.float32)
    mean = tl.sum(row, 0) / channels
    centred = tl.where(there, row - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / channels + eps)
    scale = tl.load(weight + channel, mask=there, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0).to(tl.float32)
    tl.store(out + at, (centred * inverse * scale + shift).to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated(rows, out, count, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Value times GELU of the gate, the exact one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    source = at // channels * 2 * channels + at % channels
    value = tl.load(rows + source, mask=there, other=0).to(tl.float32)
    gate = tl.load(rows + source + channels, mask=there, other=0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + at, (value * gelu).to(out.dtype.element_ty), mask=there)


@triton.jit
def _added(x, bias, residual, out, count, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    total = tl.load(x + at, mask=there, other=0).to(tl.float32)
    total += tl.load(residual + at, mask=there, other=0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + at % channels, mask=there, other=0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


class TritonOperations:
    """See `Operations`; on a card, or in Triton's interpreter."""

    def group_norm(self, x: Tensor, norm: nn.GroupNorm, added: Tensor | None = None, *, silu: bool = True) -> Tensor:
        """See `Operations`."""
        groups, width = norm.num_groups, norm.num_channels // norm.num_groups
        if groups & (groups - 1):  # the kernels' tiles have powers of two
            return PlainOperations().group_norm(x, norm, added, silu=silu)
        x = x.contiguous()
        batch, pixels, channels = x.shape
        wide = triton.next_power_of_2(width)
        block = max(1, ROWS // (groups * wide))
        rows = max(block, triton.cdiv(pixels, PROGRAMS))
        pieces = triton.cdiv(pixels, rows)
        sums = torch.empty(batch, pieces, 2, groups, dtype=torch.float32, device=x.device)
        out, stride = torch.empty_like(x), 0 if added is None or len(added) == 1 else added.stride(0)
        sizes: dict[str, Any] = {"BLOCK": block, "GROUPS": groups, "WIDTH": wide, "num_warps": 8}
        grid = pieces, batch
        _group_sums[grid](x, added, sums, stride, pixels, channels, width, rows, **sizes)
        _group_apply[grid](
            *(x, added, sums, norm.weight, norm.bias, out, stride, pixels, channels, width, rows, norm.eps),
            SILU=silu,
            PIECES=triton.next_power_of_2(pieces),
            **sizes,
        )
        return out

    def add_norm(self, x: Tensor, h: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        x, h = x.contiguous(), None if h is None else h.contiguous()
        channels, out = x.shape[-1], torch.empty_like(x)
        total = x if h is None else torch.empty_like(x)
        wide = triton.next_power_of_2(channels)
        grid = (x.numel() // channels,)
        _row_norm[grid](x, h, norm.weight, norm.bias, total, out, channels, norm.eps, WIDTH=wide, num_warps=4)
        return total, out

    def gated(self, rows: Tensor) -> Tensor:
        """See `Operations`."""
        rows, channels = rows.contiguous(), rows.shape[-1] // 2
        out = torch.empty(*rows.shape[:-1], channels, dtype=rows.dtype, device=rows.device)
        _gated[_blocks(out)](rows, out, out.numel(), channels, BLOCK=_BLOCK)
        return out

    def added(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """See `Operations`."""
        x, residual = x.contiguous(), residual.contiguous()
        out = torch.empty_like(x)
        _added[_blocks(out)](x, bias, residual, out, out.numel(), x.shape[-1], BLOCK=_BLOCK)
        return out


_BLOCK = 1024


def _blocks(out: Tensor) -> tuple[int]:
    return (triton.cdiv(out.numel(), _BLOCK),)
