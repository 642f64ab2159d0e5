"""3x3 convolutions of small maps as one product that gathers its rows, split over taps and channels.

At 8x8 and 16x16 a convolution of 1280 channels waits for its weights: tiles of the output are too few for all
multiprocessors of a card. Splitting the sum gives each a part of the weights to read. The splits are written in float32
and summed in a fixed order by a second kernel: a picture is the same each time.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.engines.autotune import Candidates

MOST_ROWS = 128
"""Pixels of all maps of a batch above which libraries keep a card busy on their own: measured on an H100."""

MOST_SPLITS = 16
"""Parts of one sum, at most: each is written and read again."""

BLOCK_K = 64
"""Channels of one step."""

FORMATS = torch.float16, torch.bfloat16


class ConvTile(NamedTuple):
    """Output pixels and channels of one program, loads in flight, warps, and programs for each multiprocessor."""

    rows: int
    outputs: int
    stages: int
    warps: int
    programs: int


TILES = ConvTile(64, 64, 4, 4, 2), ConvTile(64, 128, 4, 4, 2)
"""What is tried for a shape: the fastest of seventeen measured on an H100, with weights that no cache holds."""


@triton.jit(do_not_specialize=["rows", "height", "width", "steps"])
def _conv_split(  # type: ignore[no-untyped-def]
    x, weight, partials, rows, height, width, channels, outputs, steps,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some `steps` of the sum for BLOCK_M pixels and BLOCK_N outputs: partials (splits, rows, outputs) in float32.

    x (rows, channels), weight (outputs, 9, channels). A step is BLOCK_K channels of one tap; `WHOLE`: these divide the
    channels.
    """
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row, column = pixel // width % height, pixel % width
    pieces = tl.cdiv(channels, BLOCK_K)
    first = tl.program_id(2) * steps
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, min(first + steps, 9 * pieces)):
        tap, piece = step // pieces, step % pieces
        down, right = tap // 3 - 1, tap % 3 - 1
        channel = piece * BLOCK_K + inner
        inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        mask_x = (inside & (pixel < rows))[:, None]
        mask_w = (output < outputs)[:, None]
        if not WHOLE:
            mask_x = mask_x & (channel < channels)[None, :]
            mask_w = mask_w & (channel < channels)[None, :]
        source = (pixel + down * width + right) * channels
        a = tl.load(x + source[:, None] + channel[None, :], mask=mask_x, other=0.0)
        place = (output * 9 + tap) * channels
        b = tl.load(weight + place[:, None] + channel[None, :], mask=mask_w, other=0.0)
        total = tl.dot(a, tl.trans(b), total)
    at = (tl.program_id(2) * rows + pixel)[:, None] * outputs + output[None, :]
    tl.store(partials + at, total, mask=(pixel < rows)[:, None] & (output < outputs)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _sum_splits(  # type: ignore[no-untyped-def]
    partials, bias, out, count, outputs, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The splits one after the other, and the bias."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    parts = tl.where(there, splits, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + split * count + at, mask=parts > split, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % outputs, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


def small_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tile: ConvTile) -> Tensor:
    """A 3x3 convolution with stride 1 and padding 1: x (B, C, H, W), weight (O, C, 3, 3), bias (O,) -> (B, O, H, W).

    Maps and filters have their channels side by side. The sum is split by the number of the card's multiprocessors.
    """
    (batch, channels, height, width), outputs = x.shape, len(weight)
    rows = batch * height * width
    tiles = triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows)
    all_steps = 9 * triton.cdiv(channels, BLOCK_K)
    splits = max(1, min(MOST_SPLITS, _processors(x.device) * tile.programs // (tiles[0] * tiles[1])))
    steps = triton.cdiv(all_steps, splits)
    splits = triton.cdiv(all_steps, steps)  # none is empty
    partials = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _conv_split[(*tiles, splits)](
        *(x, weight, partials, rows, height, width, channels, outputs, steps),
        WHOLE=channels % BLOCK_K == 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=BLOCK_K,
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    out = torch.empty(batch, height, width, outputs, dtype=x.dtype, device=x.device)
    count, block = out.numel(), 128  # one number a thread, all of whose splits are then loaded at once
    unrolled = triton.next_power_of_2(splits)
    _sum_splits[(triton.cdiv(count, block),)](partials, bias, out, count, outputs, splits, SPLITS=unrolled, BLOCK=block)
    return out.permute(0, 3, 1, 2)


def _processors(device: torch.device) -> int:
    """The multiprocessors of a card; a few for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def small_conv_candidates(x: Tensor, weight: Tensor, bias: Tensor | None) -> Candidates:
    """`small_conv` with each tile that suits the shape; nothing for maps that are large or lie otherwise."""
    rows = x.numel() // max(1, x.shape[1])
    side_by_side = all(each.is_contiguous(memory_format=torch.channels_last) for each in (x, weight))
    aligned = x.shape[1] % 16 == 0 and len(weight) % 16 == 0 and weight.numel() < 1 << 31
    if not (0 < rows <= MOST_ROWS and side_by_side and aligned and x.dtype in FORMATS and x.dtype == weight.dtype):
        return {}
    return {"split " + "x".join(map(str, tile)): partial(small_conv, x, weight, bias, tile) for tile in TILES}
