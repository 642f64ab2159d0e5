"""Stopping a run by Ctrl-C or SIGTERM: the first finishes the running step, the second does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_SECONDS = 2.0
"""A launcher passes on the signal that the terminal has sent to all processes already: within this it is the same."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Whether this process received a stop signal inside `listening`; each of `ranks` processes has its own."""

    def __init__(self, ranks: int = 1) -> None:
        self.requested, self.ranks, self._since = False, ranks, 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM until the context ends; a second one raises `KeyboardInterrupt`.

        Outside the main thread, which alone can, and where the parent process has them ignored, nothing is taken.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        try:
            for number in before:
                signal.signal(number, self._on_signal)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")
        elif self.ranks == 1 or time.monotonic() - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt
