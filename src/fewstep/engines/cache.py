"""Caches of an engine between calls, valid until a weight changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fewstep.engines.engine import Embedding

PROMPTS = 16
"""Embeddings that `PromptCache` holds at most."""

T = TypeVar("T")


class VersionedCache(Generic[T]):
    """Caches one result; recomputed when the input, or a weight's pointer or version, changes.

    Threads may share one: what they compare and what they return is one tuple, read once.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor | None, tuple[int, ...], T] | None = None

    def get(self, weights: tuple[Tensor, ...], make: Callable[[], T], value: Tensor | None = None) -> T:
        """The last result, or a new one from `make`; `value` is compared number by number."""
        state, last = weights_version(*weights), self._last
        if last is not None and last[1] == state and _same(last[0], value):
            return last[2]
        made = make()
        self._last = (None if value is None else value.clone(), state, made)
        return made


def weights_version(*weights: Tensor) -> tuple[int, ...]:
    """Pointer and version of each weight: another tuple whenever one of them changes."""
    return tuple(n for w in weights for n in (w.data_ptr(), 0 if w.is_inference() else w._version))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


class WeightsWatch:
    """Tells whether weights were changed in place, or moved, since the last look; a microsecond for ten."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._versions: list[int] | None = None
        self._places: list[int] | None = None

    def look(self) -> tuple[bool, bool]:
        """Whether any was changed, and whether any was moved; the first look says yes and no."""
        versions, before = [weight._version for weight in self._counted], self._versions
        places, lay = [weight.data_ptr() for weight in self._weights], self._places
        self._versions, self._places = versions, places
        return versions != before, lay is not None and places != lay


class PromptCache:
    """Caches the embeddings of the last prompts; a change of the towers' weights makes them invalid."""

    def __init__(self) -> None:
        self._known: dict[object, Embedding] = {}
        self._lock = threading.Lock()

    def get(self, ids: Sequence[Tensor], weights: Sequence[Tensor], make: Callable[[], Embedding]) -> Embedding:
        """A copy of the embedding of `ids`, which `make` computes when it is new."""
        key = (*((tuple(each.shape), each.cpu().numpy().tobytes()) for each in ids), weights_version(*weights))
        found = self._known.get(key)
        if found is None:
            found = make()
            with self._lock:
                while len(self._known) >= PROMPTS:
                    del self._known[next(iter(self._known))]
                self._known[key] = found
        context, pooled = found
        return context.clone(), None if pooled is None else pooled.clone()
