"""What all fast layers of a CPU engine share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cpu.compiled import Kernels
from fewstep.engines.cpu.optimizations import Optimizations


@dataclass(kw_only=True)
class LayerContext:
    """Autotuner, compiled kernels if any, optimizations, and how many more bytes of transformed weights may be cached.

    `strict`: only convolutions whose rounding errors are no larger than those of the definition.
    """

    autotuner: Autotuner
    kernels: Kernels | None
    optimizations: Optimizations
    budget: int
    strict: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _stored: set[object] = field(default_factory=set, repr=False)

    def reserve(self, layer: object, size: int) -> bool:
        """Take `size` bytes for `layer` out of the budget, once; False where they are no longer in it."""
        with self._lock:
            if layer not in self._stored and size <= self.budget:
                self.budget -= size
                self._stored.add(layer)
            return layer in self._stored
