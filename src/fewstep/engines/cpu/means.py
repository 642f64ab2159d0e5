"""What the fast layers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fewstep.engines.cpu.choices import Choices
from fewstep.engines.cpu.compiled import Kernels
from fewstep.engines.cpu.tricks import Tricks

T = TypeVar("T")


@dataclass(kw_only=True)
class Means:
    """Choices of ways, kernels where there are any, tricks, and how many bytes of transformed weights may be kept yet.

    `strict`: only convolutions whose rounding errors are no larger than those of the definition.
    """

    choices: Choices
    kernels: Kernels | None
    tricks: Tricks
    budget: int
    strict: bool = False


class Kept(Generic[T]):
    """What was made of a tensor and of weights the last time, for as long as neither changes."""

    def __init__(self) -> None:
        self._last: tuple[Tensor | None, tuple[int, ...], T] | None = None

    def get(self, weights: tuple[Tensor, ...], make: Callable[[], T], value: Tensor | None = None) -> T:
        """The last result, or a new one from `make`; `value` is compared number by number."""
        state = state_of(*weights)
        if self._last is not None and self._last[1] == state and _same(self._last[0], value):
            return self._last[2]
        made = make()
        self._last = (None if value is None else value.clone(), state, made)
        return made


def state_of(*weights: Tensor) -> tuple[int, ...]:
    """What changes when weights do."""
    return tuple(n for w in weights for n in (w.data_ptr(), 0 if w.is_inference() else w._version))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
