"""Which functions are recorded as one graph, and how what they make comes to the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fewstep.engines.engine import Function

MOST_KEYS = 256
"""Keys whose first use is remembered."""


class Recordings:
    """Decides what is recorded: a key at its second use, unless it, or all, was refused.

    `running` is True while a recorded function calls the engine. The engine's lock guards it.
    """

    def __init__(self, *, refused: bool = False) -> None:
        self.running, self._refused = False, refused
        self._uses: dict[Hashable, bool] = {}  # False once refused

    def wants(self, key: Hashable) -> bool:
        """Whether this use of `key` is to be recorded or replayed."""
        if self._refused:
            return False
        if key in self._uses:
            return self._uses[key]
        while len(self._uses) >= MOST_KEYS:
            del self._uses[next(iter(self._uses))]
        self._uses[key] = True
        return False

    def refuse(self, key: Hashable) -> None:
        """Never record `key` again."""
        self._uses[key] = False

    def marked(self, function: Function) -> Function:
        """The function, during which `running` is True."""

        def run(*given: Tensor | None) -> Sequence[Tensor]:
            self.running = True
            try:
                return function(*given)
            finally:
                self.running = False

        return run


def on_the_host(outputs: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Begin to copy `outputs` to the CPU; the function that waits until they are there, and gives them."""
    if not outputs[0].is_cuda:
        clones = [out.clone() for out in outputs]
        return lambda: clones
    copies = [torch.empty(out.shape, dtype=out.dtype, pin_memory=True) for out in outputs]
    for copy, out in zip(copies, outputs, strict=True):
        copy.copy_(out, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def wait() -> Sequence[Tensor]:
        there.synchronize()
        return copies

    return wait
