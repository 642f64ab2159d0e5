"""Functions of tensors as CUDA graphs: one launch instead of hundreds (developer.nvidia.com/blog/cuda-graphs)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

MOST = 24
"""Graphs that are kept; the one that was not used for the longest goes first."""

WARM_UPS = 3
"""Runs before the capture: libraries choose their algorithms, Triton compiles, the autotuner measures."""

Given = Sequence[Tensor | None]
Function = Callable[..., Sequence[Tensor | None]]


class Replayable(Protocol):
    """A function whose inputs and outputs have fixed addresses."""

    def replay(self, given: Given) -> Sequence[Tensor | None]:
        """The function's outputs for `given`, good until the next replay."""


class CapturedGraph:
    """A CUDA graph of a function of tensors, given on the card or the CPU and copied to the card.

    Its memory comes from `pool`, which graphs that never run at once may share.
    """

    def __init__(self, function: Function, given: Given, pool: Any) -> None:
        self._inputs = [None if each is None else each.to("cuda", copy=True) for each in given]
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def replay(self, given: Given) -> Sequence[Tensor | None]:
        """See `Replayable`. Launches and comes back; the host does not wait."""
        for held, each in zip(self._inputs, given, strict=True):
            if held is not None and each is not None:
                held.copy_(each, non_blocking=True)
        self._graph.replay()
        return self._outputs


class EagerCall:
    """A function that is called each time, without a graph."""

    def __init__(self, function: Function, given: Given) -> None:
        self._function = function

    def replay(self, given: Given) -> Sequence[Tensor | None]:
        """See `Replayable`."""
        return self._function(*given)


Record = Callable[[Function, Given], Replayable]


class Graphs:
    """Functions by name, recorded once for each shape of their inputs.

    A shape that is new costs the warm-up and the capture, a few tenths of a second; nothing is compiled for it.
    """

    def __init__(self, record: Record | None = None, most: int = MOST) -> None:
        self._record, self._most = record or _capturing(), most
        self._known: dict[object, Replayable] = {}

    def run(self, name: Hashable, function: Function, *given: Tensor | None) -> Sequence[Tensor | None]:
        """The outputs of `function`, good until the next run of the same name and shapes."""
        key = (name, *(None if each is None else (tuple(each.shape), each.dtype) for each in given))
        recorded = self._known.pop(key, None)
        if recorded is None:
            while len(self._known) >= self._most:
                del self._known[next(iter(self._known))]
            recorded = self._record(function, given)
        self._known[key] = recorded  # the latest stands last
        return recorded.replay(given)

    def clear(self) -> None:
        """Forget all: weights have moved, or memory is needed."""
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)


def _capturing() -> Record:
    pool: list[Any] = []

    def record(function: Function, given: Given) -> Replayable:
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        return CapturedGraph(function, given, pool[0])

    return record
