"""The kernels touch nothing beside their tensors, as AddressSanitizer sees it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.engines.cpu.build import SOURCES

SCRIPT = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The kernels built with the sanitizers, and the runtime to load before them."""
    gcc = shutil.which("gcc")
    if gcc is None or platform.system() != "Linux":
        pytest.skip("no gcc")
    found = subprocess.run(
        [gcc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("gcc has no AddressSanitizer")
    path = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    native = "-march=native" if platform.machine() in ("x86_64", "amd64") else "-mcpu=native"
    flags = ["-O1", native, "-shared", "-fPIC", "-pthread", "-fsanitize=address", "-fno-omit-frame-pointer"]
    subprocess.run([gcc, *flags, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(path)], check=True, timeout=300)
    return path, found


def run(library: tuple[Path, str], *more: str) -> subprocess.CompletedProcess[str]:
    path, runtime = library
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(SCRIPT), str(path), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_kernels_touch_their_tensors_alone(library: tuple[Path, str]) -> None:
    found = run(library)
    assert found.stdout == "all within their tensors\n", found.stderr[:3000]


def test_the_sanitizer_sees_a_float_too_many(library: tuple[Path, str]) -> None:
    """What the test above relies on."""
    assert "AddressSanitizer" in run(library, "short").stderr
