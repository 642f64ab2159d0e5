"""What all tests share: no network, the same random numbers, and the embedded model."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch, huggingface_hub or tokenizers: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 4)))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fewstep-tests-")  # what engines find out about this machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for cards, one number after the other in Python

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None)  # a clock says nothing on a shared machine
settings.load_profile("house")

LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to another machine is a test's mistake."""
    connect = socket.socket.connect

    def local_connect(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in LOCAL:
            raise AssertionError(f"a test tried to reach {address}; tests run without a network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Random weights are the same in every run and in any order of the tests."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The pipeline of the embedded model, loaded once."""
    import fewstep

    return fewstep.load("blocks-base", device="cpu")
