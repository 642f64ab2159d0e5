"""What threads that share a model wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class WeightsLock:
    """Lets any number of threads compute with a model's weights, or one change them.

    A thread that wants to change them goes before those that begin to compute after it. A thread that computes may
    say so again, and must not change them meanwhile. A copy is a lock of its own.
    """

    def __init__(self) -> None:
        self._entrance, self._left = threading.Lock(), threading.Condition()
        self._computing, self._depth = 0, threading.local()

    def __reduce__(self) -> tuple[type[WeightsLock], tuple[()]]:
        return WeightsLock, ()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The weights stay what they are during the block."""
        depth: int = getattr(self._depth, "value", 0)
        if depth == 0:
            with self._entrance, self._left:
                self._computing += 1
        self._depth.value = depth + 1
        try:
            yield
        finally:
            self._depth.value = depth
            if depth == 0:
                with self._left:
                    self._computing -= 1
                    self._left.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody computes with the weights during the block."""
        assert not getattr(self._depth, "value", 0), "a thread would wait for itself"
        with self._entrance, self._left:
            self._left.wait_for(lambda: self._computing == 0)
            yield


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """`functools.cache`, with other threads waiting for the first that asks."""
    lock, stored = threading.RLock(), cache(make)

    @wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock:
            return stored(*args, **kwargs)  # type: ignore[arg-type]  # hashable, as for `cache`

    found.cache_clear = stored.cache_clear  # type: ignore[attr-defined]
    return found
