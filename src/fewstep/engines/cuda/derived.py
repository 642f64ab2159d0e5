"""Tensors made of weights, at one place in memory for good: graphs read them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.engines.choices import Choices
from fewstep.engines.cuda.operations import Operations
from fewstep.engines.cuda.tricks import CudaTricks
from fewstep.engines.kept import state_of

Weights = Callable[[], Sequence[Tensor]]


class Derived:
    """What `make` makes of some weights; made anew, in the same place, when these have changed."""

    def __init__(self, weights: Weights, make: Callable[[], Tensor]) -> None:
        self._weights, self._make = weights, make
        self._value: Tensor | None = None
        self._state: tuple[int, ...] = ()

    @property
    def value(self) -> Tensor:
        """The tensor as of the last `refresh`."""
        if self._value is None:
            self.refresh()
        assert self._value is not None
        return self._value

    def refresh(self) -> None:
        """Make it anew where the weights are no longer what they were."""
        state = state_of(*self._weights())
        if state == self._state:
            return
        with torch.inference_mode(False), torch.no_grad():
            made = self._make()
            if self._value is not None and _kind(made) == _kind(self._value):
                self._value.copy_(made)
            else:
                self._value = made
        self._state = state


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


@dataclass(frozen=True, kw_only=True)
class Means:
    """What the fast layers share: the operations, the choices of ways, tricks.

    `derived` are all tensors that the layers have made of weights.
    """

    operations: Operations
    choices: Choices
    tricks: CudaTricks = field(default_factory=CudaTricks)
    derived: list[Derived] = field(default_factory=list)

    def derive(self, weights: Weights, make: Callable[[], Tensor]) -> Derived:
        """A tensor of these weights, kept up to date with them."""
        made = Derived(weights, make)
        self.derived.append(made)
        return made

    def refresh(self) -> None:
        """Make all anew whose weights have changed."""
        for each in self.derived:
            each.refresh()
