"""Which device and number format a machine does best."""

from __future__ import annotations

import torch

from fewstep.errors import InputError, unknown

_HALVES = (torch.float16, torch.bfloat16)


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device named, or the best one here: CUDA, then Apple's MPS, then the CPU.

    Raises InputError if the named one cannot be used on this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(unknown("device", str(name), ("cpu", "cuda", "cuda:1", "mps"))) from None
    if (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise InputError(f"device {str(device)!r} is not available to PyTorch {torch.__version__} here; use 'cpu'")
    return device


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format named, or the fastest that `device` computes without emulating it.

    A CPU computes in float32 unless it has bfloat16 matrix instructions, and then only if asked: emulated halves were
    measured to be hundreds of times slower. Raises InputError for such a request.
    """
    if name is None:
        return _native(device)
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if dtype not in (torch.float32, *_HALVES):
        raise InputError(unknown("dtype", str(name), ("float32", "float16", "bfloat16")))
    if device.type == "cpu" and dtype in _HALVES and not _cpu_computes(dtype):
        raise InputError(f"this CPU emulates {dtype}, hundreds of times slower than float32; use dtype='float32'")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _native(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def _cpu_computes(dtype: torch.dtype) -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wanted = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16", "fp16")
    return any(bool(capabilities.get(name)) for name in wanted)
