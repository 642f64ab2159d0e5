"""A product and its gate in one kernel: value times the exact GELU of the gate (arXiv:2002.05202)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.engines.autotune import Candidates

BLOCK_K = 64
"""Channels of one step."""

GROUP = 8
"""Tiles of rows that take the same weights one after the other, while these are in the cache."""

FORMATS = torch.float16, torch.bfloat16


class GegluTile(NamedTuple):
    """Rows and outputs of one program, loads in flight, and warps."""

    rows: int
    outputs: int
    stages: int
    warps: int


TILES = GegluTile(128, 128, 3, 8), GegluTile(64, 64, 4, 4)


@triton.jit(do_not_specialize=["rows"])
def _geglu(  # type: ignore[no-untyped-def]
    x, weight, bias, out, rows, channels, outputs,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x (rows, channels), weight (2 * outputs, channels): values, then gates. `WHOLE`: BLOCK_K divides the channels."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    group, inside = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    row = (group * GROUP + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    there_m, there_n = (row < rows)[:, None], (output < outputs)[:, None]
    at_x = x + row.to(tl.int64)[:, None] * channels + inner[None, :]
    at_w = weight + output[:, None] * channels + inner[None, :]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, channels, BLOCK_K):
        mask_x, mask_w = there_m, there_n
        if not WHOLE:
            known = (first + inner < channels)[None, :]
            mask_x, mask_w = there_m & known, there_n & known
        a = tl.load(at_x + first, mask=mask_x, other=0.0)
        v = tl.load(at_w + first, mask=mask_w, other=0.0)
        g = tl.load(at_w + outputs * channels + first, mask=mask_w, other=0.0)
        value = tl.dot(a, tl.trans(v), value)
        gate = tl.dot(a, tl.trans(g), gate)
    if bias is not None:
        value += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + outputs + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    result = value * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))
    at = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=there_m & (output < outputs)[None, :])


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None, tile: GegluTile) -> Tensor:
    """Value times GELU(gate) of x weight^T + bias: x (..., C), weight (2 * O, C), bias (2 * O,) -> (..., O)."""
    x, outputs, channels = x.contiguous(), len(weight) // 2, x.shape[-1]
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    rows = x.numel() // channels
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)
    _geglu[grid](
        *(x, weight, bias, out, rows, channels, outputs),
        WHOLE=channels % BLOCK_K == 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    return out


def geglu_candidates(x: Tensor, weight: Tensor, bias: Tensor | None) -> Candidates:
    """`geglu` with each tile; nothing for formats and sizes that it does not take."""
    aligned = weight.shape[1] % 16 == 0 and len(weight) % 32 == 0 and weight.numel() < 1 << 31
    if not (aligned and weight.is_contiguous() and x.numel() and x.dtype in FORMATS and x.dtype == weight.dtype):
        return {}
    return {"one kernel " + "x".join(map(str, tile)): partial(geglu, x, weight, bias, tile) for tile in TILES}
