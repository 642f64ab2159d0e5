"""The moving average of a model's weights, which is what samples well."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """A copy of `model` whose parameters follow it as an exponential moving average.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten. Buffers are
    copied as they are.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: M) -> None:
        """Move towards the parameters of `model`, which must have the structure of the first one."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [parameter.data for parameter in self.model.parameters()]
        torch._foreach_lerp_(averages, [parameter.data for parameter in model.parameters()], 1 - decay)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
