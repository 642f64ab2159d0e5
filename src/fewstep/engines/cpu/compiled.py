"""The kernels in `kernels/` as functions of tensors; build.py builds the library."""

from __future__ import annotations

import ctypes
from ctypes import CDLL, Array, c_int, c_long, c_void_p
from pathlib import Path
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.engines.cpu.scratch import BufferPool, scratch

SCHEMES = ("winograd", "strict", "upsampled")
"""As convolution.c counts them; what they are says winograd.py."""
CHUNK = 2 << 20
"""Floats of a convolution's transformed input at a time: a third of a last-level cache."""
PIXELS = 512
"""Summed at a time in float32, before float64 takes over."""


class ConvOptions(TypedDict, total=False):
    """What the convolution kernel fuses: see `ConvEpilogue` of convolution.py, and the norm before it.

    `affine`: scale and shift, each with B * C numbers, applied with a SiLU to the input. `residual` is added, and if
    `inplace` the result is written into its memory; then `relu` applies ReLU. Of the output's rows and columns each
    `every`th is kept, from number `first` on.
    """

    affine: tuple[Tensor, Tensor] | None
    residual: Tensor | None
    inplace: bool
    relu: bool
    every: int
    first: int


class Kernels:
    """Convolutions, linear layers, attention and sums of float32 tensors, by as many threads as PyTorch uses.

    Weights may be in float16: then each is widened as it is read.
    """

    def __init__(self, library: CDLL) -> None:
        self._library, self._parallel, self._pool = library, _openmp(), BufferPool()
        library.convolution_scratch.argtypes = [c_void_p, c_int, c_int, c_long]
        library.convolve.argtypes = [
            c_void_p,
            c_void_p,
            c_int,
            *[c_void_p] * 6,
            c_int,
            c_int,
            c_long,
            c_void_p,
            c_void_p,
        ]
        library.attention_scratch.argtypes = [c_void_p, c_int]
        library.attend.argtypes = [c_void_p] * 5 + [c_int, c_void_p, c_void_p]
        library.sums.argtypes = [c_void_p, c_void_p, *[c_long] * 4, c_int, c_void_p]
        library.linear_scratch.argtypes = [c_long, c_int, c_int]
        library.linear.argtypes = [c_void_p, c_void_p, c_int, *[c_void_p] * 4, c_int, c_int, c_void_p, c_void_p]
        library.conv_small_cin_scratch.argtypes = [c_long, c_long, c_int]
        library.conv_small_cin.argtypes = [c_void_p] * 5 + [c_int, c_void_p, c_void_p]
        sizes = (
            library.convolution_scratch,
            library.conv_small_cin_scratch,
            library.attention_scratch,
            library.linear_scratch,
        )
        for function in (*sizes, library.wide, library.lanes):
            function.restype = c_long
        self.wide: int = library.wide()
        self._lanes: int = library.lanes()

    def takes(self, weight: Tensor) -> bool:
        """Whether `linear` can run a layer with `weight` (O, C), or `conv3x3` one with (O, C, 3, 3), and any O."""
        return weight.shape[1] % self._lanes == 0 and (weight.dim() == 4 or weight.shape[0] % self.wide == 0)

    def conv3x3(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scheme: str,
        **options: Unpack[ConvOptions],
    ) -> Tensor:
        """See `winograd.conv3x3`; the weight is the plain one, and `bias` may be (B, O)."""
        affine, residual = options.get("affine"), options.get("residual")
        _check_conv(x, weight, bias, affine, residual)
        relu, every, first = options.get("relu", False), options.get("every", 1), options.get("first", 0)
        if missing := -len(weight) % self.wide:
            weight, bias = F.pad(weight, (0, 0) * 3 + (0, missing)), bias if bias is None else F.pad(bias, (0, missing))
            if residual is not None:
                options["residual"] = F.pad(residual.permute(0, 2, 3, 1), (0, missing)).permute(0, 3, 1, 2)
            wider = self.conv3x3(x, weight, bias, scheme, **options)
            return to_channels_last(wider[:, :-missing])
        x, (batch, channels, height, width) = to_channels_last(x), x.shape
        scale = 2 if scheme == "upsampled" else 1
        size = [len(range(first, side * scale, every)) for side in (height, width)]
        _check(self.takes(weight) and every in (1, 2) and first in (0, 1), "channels of whole vectors", x, weight)
        same = residual is None or (residual.shape == (batch, len(weight), *size) and residual.dtype == x.dtype)
        _check(same, "a residual of the output's shape and format", x, weight, residual)
        added = residual if residual is None else to_channels_last(residual)
        reused = added if options.get("inplace") else None
        out = self._pool.empty(batch, *size, len(weight)).permute(0, 3, 1, 2) if reused is None else reused
        rows = len(weight) if bias is not None and bias.dim() > 1 else 0
        sizes = (c_long * 9)(batch, height, width, channels, len(weight), rows, every, first, relu)
        number, threads = SCHEMES.index(scheme), torch.get_num_threads()
        chunk, space = self._chunk(sizes, number, threads)
        weight = weight.contiguous()
        around = [*(_floats(each) for each in (bias, *(affine or (None, None)))), added]
        self._library.convolve(
            *(x.data_ptr(), weight.data_ptr(), weight.dtype == torch.float16),
            *(each if each is None else each.data_ptr() for each in (*around, out)),
            sizes,
            *(number, threads, chunk),
            space.data_ptr(),
            self._parallel,
        )
        return out

    def conv3x3_small_cin(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same by the definition, for maps of a few channels: the first convolution of a network."""
        _check_conv(x, weight, bias)
        _check(len(weight) % self.wide == 0, f"a multiple of {self.wide} filters", weight)
        x, (batch, channels, height, width) = to_channels_last(x), x.shape
        out, threads = self._pool.empty(batch, height, width, len(weight)), torch.get_num_threads()
        turned = weight.float().permute(2, 3, 1, 0).contiguous()
        given = x, turned, bias.float().contiguous(), out
        self._library.conv_small_cin(
            *(each.data_ptr() for each in given),
            (c_long * 5)(batch, height, width, channels, len(weight)),
            threads,
            scratch("kernels", (self._library.conv_small_cin_scratch(width, channels, threads),)).data_ptr(),
            self._parallel,
        )
        return out.permute(0, 3, 1, 2)

    def _chunk(self, sizes: Array[c_long], number: int, threads: int) -> tuple[int, Tensor]:
        """How much of the transformed input is kept at a time, and memory for it: less where memory is short."""
        for chunk in (CHUNK, CHUNK // 8):
            try:
                return chunk, scratch("kernels", (self._library.convolution_scratch(sizes, number, threads, chunk),))
            except RuntimeError:
                continue
        return 0, scratch("kernels", (self._library.convolution_scratch(sizes, number, threads, 0),))

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, gated: bool = False
    ) -> Tensor:
        """x (..., C) times weight (O, C), plus bias and residual; `gated`: one half times the GELU of the other."""
        _check(
            x.numel() > 0 and weight.dim() == 2 and x.shape[-1:] == weight.shape[1:],
            "x (..., C), weight (O, C)",
            x,
            weight,
        )
        outputs, depth = len(weight) // (2 if gated else 1), weight.shape[1]
        _check(self.takes(weight) and outputs % self.wide == 0, f"a multiple of {self.wide} outputs", weight)
        _check(not gated or bias is not None, "a gate with a bias", weight)
        _check(bias is None or bias.shape == (len(weight),), "a bias (O)", weight, bias)
        _check(
            residual is None or residual.shape == (*x.shape[:-1], outputs),
            "a residual of the output's shape",
            x,
            residual,
        )
        _check_numbers(x, weight, bias, residual)
        rows, weight, around = _apart(x.reshape(-1, depth)), weight.contiguous(), [_floats(bias), _floats(residual)]
        out, threads = self._pool.empty(*x.shape[:-1], outputs), torch.get_num_threads()
        self._library.linear(
            *(rows.data_ptr(), weight.data_ptr(), weight.dtype == torch.float16),
            *(each if each is None else each.data_ptr() for each in (*around, out)),
            (c_long * 4)(len(rows), depth, outputs, rows.stride(0)),
            *(gated, threads),
            scratch("kernels", (self._library.linear_scratch(depth, gated, threads),)).data_ptr(),
            self._parallel,
        )
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """Scaled dot-product attention of rows q (B, N, heads * D) to k and v (B, M, heads * D): (B, N, heads * D)."""
        same = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]
        _check(same and q.numel() > 0 and k.numel() > 0, "q (B, N, C), k and v (B, M, C)", q, k, v)
        _check(heads > 0 and q.shape[2] % heads == 0, f"channels that {heads} heads share", q)
        _check_numbers(q, k, v, None)
        (batch, queries, channels), keys = q.shape, k.shape[1]
        q, k, v = (_rows(each) for each in (q, k, v))
        out, threads = self._pool.empty(batch, queries, channels), torch.get_num_threads()
        strides = q.stride(1), k.stride(1), v.stride(1)
        shape = (c_long * 8)(batch, queries, keys, heads, channels // heads, *strides)
        space = scratch("kernels", (self._library.attention_scratch(shape, threads),))
        pointers = (each.data_ptr() for each in (q, k, v, out))
        self._library.attend(*pointers, shape, threads, space.data_ptr(), self._parallel)
        return out

    def sums(self, x: Tensor) -> Tensor:
        """Sum and sum of squares of each channel of x (B, C, H, W): (B, 2, C) float64."""
        _check(x.dim() == 4 and x.numel() > 0 and x.shape[1] % self._lanes == 0, "x (B, C, H, W)", x)
        _check_numbers(x, None)
        x, (batch, channels, height, width) = to_channels_last(x), x.shape
        parts = scratch("sums", (batch, -(-height * width // PIXELS), 2, channels))
        sizes = batch, height * width, channels, PIXELS
        self._library.sums(x.data_ptr(), parts.data_ptr(), *sizes, torch.get_num_threads(), self._parallel)
        return parts.double().sum(1)


def _openmp() -> c_void_p | None:
    """The function by which PyTorch's own OpenMP starts its threads, where that is GNU's: others would compete."""
    package = Path(torch.__file__).parent
    for path in (*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")):
        try:
            return ctypes.cast(CDLL(str(path)).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def _check(right: bool, wanted: str, *given: Tensor | None) -> None:
    """ValueError where a kernel would read or write beside its tensors."""
    if not right:
        shapes = ", ".join("None" if each is None else str(tuple(each.shape)) for each in given)
        raise ValueError(f"a kernel was given tensors of {shapes}; it takes {wanted}")


def _check_numbers(x: Tensor, weight: Tensor | None, *others: Tensor | None) -> None:
    """ValueError for a device or a number format that the kernels do not read; `others` are converted."""
    there = [each for each in (x, weight, *others) if each is not None]
    if not (x.dtype == torch.float32 and all(each.device.type == "cpu" for each in there)):
        raise ValueError(f"a kernel was given {x.dtype} on {x.device}; it computes in float32 on a CPU")
    if weight is not None and weight.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"a kernel was given a weight of {weight.dtype}; it reads float32 and float16")


def _check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    affine: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> None:
    """ValueError unless all that a convolution reads and writes has the size that its kernel trusts."""
    fits = x.dim() == weight.dim() == 4 and x.numel() > 0 and weight.shape[1:] == (x.shape[1], 3, 3)
    _check(fits, "x (B, C, H, W), weight (O, C, 3, 3)", x, weight)
    outputs = ((len(weight),), (len(x), len(weight)))
    _check(bias is None or bias.shape in outputs, "a bias (O) or (B, O)", x, weight, bias)
    for each in affine or ():
        _check(each.numel() == len(x) * x.shape[1], "a scale and a shift (B, C)", x, each)
    _check_numbers(x, weight, bias, *(affine or ()), residual)


def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) in channels-last memory format."""
    return x.contiguous(memory_format=torch.channels_last)


def _floats(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.float().contiguous()


def _apart(rows: Tensor) -> Tensor:
    """Rows (N, C) that do not all begin in one set of a cache, as those a multiple of 4096 bytes apart do."""
    if rows.shape[1] % 1024:
        return rows.contiguous()
    apart = scratch("rows", (len(rows), rows.shape[1] + 16))[:, :-16]
    return apart.copy_(rows)


def _rows(x: Tensor) -> Tensor:
    """x (B, N, C), its channels side by side and its pictures one after the other."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()
