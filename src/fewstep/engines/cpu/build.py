"""The library of kernels: built once for this very processor, where there is a C compiler, and never needed.

It is code, so it is loaded only from a folder that no other user can write to, and only if it is, to the byte, what was
built.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from ctypes import CDLL
from hashlib import blake2b, sha256
from pathlib import Path

import torch
import torch.nn.functional as F

from fewstep.engines.autotune import processor
from fewstep.engines.cpu.compiled import SCHEMES, Kernels
from fewstep.engines.folder import cache_folder, is_own
from fewstep.files import atomic_write, partial_path
from fewstep.locks import made_once

SOURCES = Path(__file__).parent / "kernels"

_AS_IT_IS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no link is followed, no pipe waited for

_log = logging.getLogger(__name__)


@made_once
def kernels() -> Kernels | None:
    """The kernels, built when first asked for; None without a compiler, or if what they compute is wrong here."""
    for compiler in _compilers():
        try:
            found = Kernels(CDLL(str(_built(compiler))))
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            _log.debug("the CPU kernels were not built by %s: %s", compiler[0], error)
            continue
        if _right(found):
            return found
        _log.debug("the CPU kernels as built by %s compute wrongly here", compiler[0])
    _log.debug("no compiled CPU kernels; pip install 'fewstep[kernels]' brings a compiler")
    return None


def _compilers() -> list[list[str]]:
    """The commands to try: $CC, the system's compilers, the one that the extra brings."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    found = [[path] for name in names if name and (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    return found


def _built(compiler: list[str]) -> Path:
    """The library, from the cache where it is whole there, or made now."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    flags = ["-O3", native, "-shared", "-fPIC", "-pthread"]
    what = (*(source.read_bytes() for source in sources), *flags, *compiler, processor())
    name = f"kernels-{blake2b(repr(what).encode(), digest_size=8).hexdigest()}.so"
    path = (cache_folder() or _temporary_folder()) / name
    if not _whole(path):
        files = [str(source) for source in sources if source.suffix == ".c"]
        with partial_path(path) as partial:
            command = [*compiler, *flags, *files, "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            partial.chmod(0o700)  # whatever the user's umask
            digest = sha256(partial.read_bytes()).hexdigest()
        with atomic_write(_digest_file(path)) as file:
            file.write(digest.encode())
    return path


@made_once
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fewstep-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _whole(path: Path) -> bool:
    """Whether the library is there, this user's own, and byte for byte what was built: not cut short, not another."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | _AS_IT_IS), "rb") as file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) and is_own(status)):
                return False
            return sha256(file.read()).hexdigest() == _digest_file(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return False


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


@torch.no_grad()
def _right(built: Kernels) -> bool:
    """Whether what they compute is what PyTorch computes."""
    x = torch.linspace(-1, 1, 2 * built.wide * 35).sin().view(1, 2 * built.wide, 5, 7)
    weight = torch.linspace(-1, 1, built.wide * 2 * built.wide * 9).cos().view(built.wide, 2 * built.wide, 3, 3)
    close = [
        torch.allclose(built.conv3x3(source, weight, None, scheme), F.conv2d(target, weight, padding=1), atol=1e-2)
        for scheme in SCHEMES
        for source, target in [(x, F.interpolate(x, scale_factor=2.0) if scheme == "upsampled" else x)]
    ]
    rows = x.view(1, 5, -1)
    wanted = F.scaled_dot_product_attention(rows, rows, rows)
    return all(close) and torch.allclose(built.attention(rows, rows, rows, 1), wanted, atol=1e-3)
