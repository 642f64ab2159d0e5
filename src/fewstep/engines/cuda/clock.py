"""Timing of calls on a card, and the autotuner that uses it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter

import torch

from fewstep.engines.autotune import Autotuner, cache_file, digest
from fewstep.locks import made_once

LAUNCHES = 10
"""Calls that are measured together, at most."""

LONGEST = 0.02
"""Seconds of these calls together, about, where one alone is not longer."""

HERTZ = 3e9
"""Cycles a second that no card exceeds, by which sleeps are converted: on a slower one they last longer."""

SHORTEST_SLEEP, LONGEST_SLEEP = 1e-4, 0.2
"""Seconds."""

ATTEMPTS = 3
"""Measurements until one is valid; the last one counts in any case."""

TOLERANCE = 0.05
"""Relative error between results of candidates: several times bfloat16's rounding, far below a wrong kernel's."""


class DeviceClock:
    """Seconds of a call on a card, without what the host takes for launching it.

    The card sleeps while the calls are queued; two events on the stream then enclose nothing but their kernels. A
    measurement whose sleep was over before all was queued is repeated behind a longer one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def ready(self) -> bool:
        """See `Clock`. A stream that is captured must not be waited for."""
        return not torch.cuda.is_current_stream_capturing()

    def seconds(self, candidate: Callable[[], object]) -> float:
        """See `Clock`. Runs on the current stream, twelve times or more."""
        with torch.cuda.device(self.device):
            candidate()  # compiles, chooses algorithms, allocates
            torch.cuda.current_stream().synchronize()
            started = perf_counter()
            candidate()
            launching = perf_counter() - started
            torch.cuda.current_stream().synchronize()
            launches = max(1, min(LAUNCHES, int(LONGEST / (perf_counter() - started))))
            sleep = 2 * launches * launching
            for _ in range(ATTEMPTS):
                seconds, valid = _enclosed(candidate, launches, min(max(sleep, SHORTEST_SLEEP), LONGEST_SLEEP))
                if valid:
                    break
                sleep *= 4
        return seconds


def _enclosed(candidate: Callable[[], object], launches: int, sleep: float) -> tuple[float, bool]:
    """Seconds of one of `launches` calls behind a sleep of `sleep` seconds; whether it lasted until all were queued."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(int(sleep * HERTZ))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(launches):
        candidate()
    valid = not first.query()  # type: ignore[no-untyped-call]
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1000 / launches, valid


@made_once
def cuda_autotuner(device: torch.device) -> Autotuner:
    """The autotuner for this card, its driver and these versions of PyTorch, cuDNN and Triton."""
    if device.type != "cuda":
        return Autotuner()
    cudnn: object = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    card = torch.cuda.get_device_name(device), _driver(), torch.__version__, cudnn, _triton()
    return Autotuner(cache_file(f"cuda-{digest(*card)}.json"), DeviceClock(device), tolerance=TOLERANCE)


def _driver() -> str:
    """The driver's version where the system tells it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""
