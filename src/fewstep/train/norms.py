"""Norms that compute in half precision under autocast, which would give float32 to all that comes after them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.train.plan import Precision


def norms_in_half(network: nn.Module, precision: Precision) -> None:
    """Let each norm of `network` put out the number format that it is given, on a card that computes in bfloat16.

    Autocast makes float32 of a norm's input, and so of the activation behind it: twice the memory's traffic, which is
    what small networks spend their time on. The sums in a norm are of float32 all the same. In float32 nothing
    changes, nor do names and weights.
    """
    if precision != "bf16" or next(network.parameters()).device.type != "cuda":
        return
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.forward = partial(_normed, module)  # type: ignore[method-assign]


def _normed(module: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if value is None else value.to(x.dtype) for value in (module.weight, module.bias))
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, weight, bias, module.eps)
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
