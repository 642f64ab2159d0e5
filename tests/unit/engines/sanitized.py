"""Run by test_sanitizer.py under AddressSanitizer: the kernels on buffers of exactly the size that they may touch.

`python sanitized.py LIBRARY [short]`; with `short` the first output is a float too small, which must be found.
"""

from __future__ import annotations

import itertools
import sys
from ctypes import CDLL, c_int, c_long, c_void_p, memset

library = CDLL(sys.argv[1])
libc = CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = c_void_p, [c_long], [c_void_p]
for function in (
    "convolution_scratch",
    "attention_scratch",
    "linear_scratch",
    "conv_small_cin_scratch",
    "wide",
    "lanes",
):
    getattr(library, function).restype = c_long
WIDE, LANES = library.wide(), library.lanes()
held: list[int] = []
missing = 4 if "short" in sys.argv else 0


def room(numbers: int, size: int = 4) -> c_void_p:
    """Zeros in memory of its own, with nothing that may be touched around it."""
    at = libc.malloc(numbers * size)
    memset(at, 0, numbers * size)
    held.append(at)
    return c_void_p(at)


def output(numbers: int) -> c_void_p:
    global missing
    at = libc.malloc(4 * numbers - missing)
    held.append(at)
    missing = 0
    return c_void_p(at)


def longs(*values: int) -> object:
    return (c_long * len(values))(*values)


def release() -> None:
    while held:
        libc.free(held.pop())


def convolution(batch: int, height: int, width: int, channels: int, outputs: int, scheme: int, half: int) -> None:
    for every, first, threads, chunk in ((1, 0, 1, 0), (1, 0, 3, 1 << 16), (2, 0, 2, 0), (2, 1, 2, 1 << 16)):
        scale = 2 if scheme == 2 else 1
        rows, columns = (len(range(first, side * scale, every)) for side in (height, width))
        if not rows * columns:
            continue
        sizes = longs(batch, height, width, channels, outputs, outputs, every, first, 1)
        scratch = room(library.convolution_scratch(sizes, scheme, threads, c_long(chunk)))
        count = batch * rows * columns * outputs
        x, weight = room(batch * height * width * channels), room(outputs * channels * 9, 2 if half else 4)
        bias, affine, residual = room(batch * outputs), [room(batch * channels) for _ in range(2)], room(count)
        out = output(count)
        library.convolve(
            x, weight, half, bias, *affine, residual, out, sizes, scheme, threads, c_long(chunk), scratch, None
        )
        release()


def linear(rows: int, depth: int, outputs: int, gated: int, half: int) -> None:
    for threads in (1, 3):
        scratch = room(library.linear_scratch(c_long(depth), gated, threads))
        x, weight = room(rows * depth), room(outputs * (1 + gated) * depth, 2 if half else 4)
        bias, residual = room(outputs * (1 + gated)), room(rows * outputs)
        sizes = longs(rows, depth, outputs, depth)
        library.linear(x, weight, half, bias, residual, output(rows * outputs), sizes, gated, threads, scratch, None)
        release()


def attention(batch: int, queries: int, keys: int, heads: int, width: int) -> None:
    for threads in (1, 3):
        channels = heads * width
        sizes = longs(batch, queries, keys, heads, width, channels, channels, channels)
        scratch = room(library.attention_scratch(sizes, threads))
        rows = [room(batch * count * channels) for count in (queries, keys, keys)]
        library.attend(*rows, output(batch * queries * channels), sizes, threads, scratch, None)
        release()


def few(batch: int, height: int, width: int, channels: int) -> None:
    for threads in (1, 2):
        scratch = room(library.conv_small_cin_scratch(c_long(width), c_long(channels), threads))
        x, weight, bias = room(batch * height * width * channels), room(9 * channels * WIDE), room(WIDE)
        sizes = longs(batch, height, width, channels, WIDE)
        library.conv_small_cin(x, weight, bias, output(batch * height * width * WIDE), sizes, threads, scratch, None)
        release()


def sums(batch: int, pixels: int, channels: int) -> None:
    parts = -(-pixels // 512)
    x, out = room(batch * pixels * channels), output(batch * parts * 2 * channels)
    library.sums(x, out, *(c_long(n) for n in (batch, pixels, channels, 512)), c_int(2), None)
    release()


for (height, width), channels, scheme, half in itertools.product(
    ((1, 1), (1, 9), (5, 7), (4, 4), (17, 3)), (LANES, 3 * LANES, 144), range(3), (0, 1)
):
    convolution(1 + height % 2, height, width, channels, WIDE * (1 + channels // 96), scheme, half)
convolution(1, 65, 150, 2 * LANES, WIDE, 0, 0)  # so many tiles that they go through all steps in strips
for rows, depth, gated, half in itertools.product((1, 5, 77, 1009), (LANES, 5 * LANES), (0, 1), (0, 1)):
    linear(rows, depth, 2 * WIDE, gated, half)
for queries, keys, width in itertools.product((1, 57), (1, 31, 77, 600), (1, 8, 40, 64)):
    attention(2, queries, keys, 3, width)
for height, width, channels in itertools.product((1, 5), (1, 8), (3, 4, 9)):
    few(2, height, width, channels)
for pixels in (1, 511, 512, 1025):
    sums(2, pixels, 3 * LANES)
print("all within their tensors")
