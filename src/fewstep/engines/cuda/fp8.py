"""Linear layers in 8-bit floating point (e4m3, arXiv:2209.05433): twice the products a second, an error that shows.

A scale for each row of x, found as it is computed, and one for each output: no calibration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.engines.cuda.operations import Operations, PlainOperations

SMALLEST_SIDE = 256
"""Layers with fewer inputs or outputs stay in half precision: they wait for memory, not for products."""


def takes_fp8(weights: Sequence[Tensor]) -> bool:
    """Whether layers with these weights are worth it, and have sides that the products want."""
    outputs, inputs = sum(len(weight) for weight in weights), weights[0].flatten(1).shape[1]
    return min(outputs, inputs) >= SMALLEST_SIDE and outputs % 16 == 0 and inputs % 16 == 0


def fp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, C) as numbers in fp8 and a scale (1, O) in float32 for each output."""
    numbers, scale = PlainOperations().eight_bits(weight)
    return numbers, scale.T.contiguous()


def fp8_linear(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None, operations: Operations) -> Tensor:
    """x (..., C) times a weight of `fp8_weight`, sums in float32, in the format of x."""
    numbers, scale = weight
    rows, row_scale = operations.eight_bits(x.reshape(-1, x.shape[-1]))
    if x.is_cuda:  # products with a scale for each row come in bfloat16 alone
        more = None if bias is None else bias.bfloat16()
        out = torch._scaled_mm(rows, numbers.T, row_scale, scale, more, out_dtype=torch.bfloat16).to(x.dtype)
    else:
        out = (rows.float() @ numbers.float().T * row_scale * scale).to(x.dtype)
        out = out if bias is None else out + bias
    return out.reshape(*x.shape[:-1], len(numbers))
