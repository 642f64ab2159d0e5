"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """An exponential moving average of the parameters of `model`.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.updates = 0
        self.averages = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [parameter.data for parameter in self.model.parameters()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averages for its parameters, until the context ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.model.parameters(), self.averages, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)
