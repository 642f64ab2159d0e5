"""Which device and number format a machine does best."""

from __future__ import annotations

import torch

from fewstep.errors import InputError, unknown


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

    A CPU computes in float32, and float16 there only halves the memory of the weights. It computes in bfloat16 if asked
    and if it has instructions for it: emulated, it is hundreds of times slower. Raises InputError for such a request.
    """
    if name is None:
        return _native(device)
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(unknown("dtype", str(name), ("float32", "float16", "bfloat16")))
    if device.type == "cpu" and dtype == torch.bfloat16 and not _cpu_computes_bfloat16():
        raise InputError(
            "this CPU emulates bfloat16, hundreds of times slower than float32; use dtype='float32', or 'float16' for "
            "weights in half the memory"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _native(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def _cpu_computes_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
