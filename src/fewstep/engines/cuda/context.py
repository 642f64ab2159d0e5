"""What the layers of a CUDA engine share, and tensors packed from weights at fixed addresses, read by graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cache import weights_version
from fewstep.engines.cuda.operations import Operations
from fewstep.engines.cuda.optimizations import CudaOptimizations

Weights = Callable[[], Sequence[Tensor]]


class PackedWeight:
    """A tensor that `make` computes from some weights; recomputed into the same memory when these change.

    Where `make` returns a weight itself there is nothing to compute, and nothing is written.
    """

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
        """Recompute it if the pointer or version of a weight has changed."""
        weights = self._weights()
        state = weights_version(*weights)
        if state == self._state:
            return
        with torch.inference_mode(False), torch.no_grad():
            made, value = self._make(), self._value
            is_own = not any(each is weight for each in (made, value) for weight in weights)
            if is_own and value is not None and _kind(made) == _kind(value):
                value.copy_(made)
            else:
                self._value = made
        self._state = state


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


@dataclass(frozen=True, kw_only=True)
class CudaLayerContext:
    """What the layers share: operations, autotuner, optimizations.

    `packed` are all tensors that the layers have packed from weights.
    """

    operations: Operations
    autotuner: Autotuner
    optimizations: CudaOptimizations = field(default_factory=CudaOptimizations)
    packed: list[PackedWeight] = field(default_factory=list)

    def pack(self, weights: Weights, make: Callable[[], Tensor]) -> PackedWeight:
        """A tensor computed from these weights, kept up to date with them."""
        made = PackedWeight(weights, make)
        self.packed.append(made)
        return made

    def refresh(self) -> None:
        """Recompute those whose weights have changed."""
        for each in self.packed:
            each.refresh()
