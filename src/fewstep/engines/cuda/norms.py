"""GroupNorm of channels-last maps in Triton: one kernel for small maps, three passes over tiles of channels for others.

Mean and variance come from sums of differences to the first pixel of a piece of the map, and pieces are combined by
their means and squared deviations (Chan et al. 1979), so that a mean far from zero costs no digits. No sum depends on
the order in which programs run: a picture is the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fewstep.engines.autotune import Candidates
from fewstep.engines.cuda.operations import Moments


@triton.jit
def _channel_moments(  # type: ignore[no-untyped-def]
    x, c, known, count, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of the channels `c` over `count` pixels from `x` on, (COLUMNS,) each."""
    first = tl.load(x + c, mask=known, other=0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, count, ROWS, loop_unroll_factor=UNROLL):
        r = start + tl.arange(0, ROWS)
        there = (r < count)[:, None] & known[None, :]
        apart = tl.load(x + r[:, None] * channels + c[None, :], mask=there, other=0).to(tl.float32) - first[None, :]
        apart = tl.where(there, apart, 0.0)
        total += apart
        squares += apart * apart
    return _moments(first, total, squares, count)


@triton.jit
def _moments(first, total, squares, count):
    """Mean and squared deviations of `count` numbers a channel, by sums (rows, channels) of differences to `first`."""
    mean = tl.sum(total, 0) / count
    return first + mean, tl.maximum(tl.sum(squares, 0) - mean * mean * count, 0.0)


@triton.jit
def _scale_and_shift(mean, deviations, added, weight, bias, c, known, member, pixels, width, eps):
    """One factor and one summand for each channel of a few groups, by the moments of the channels.

    `member` (groups, channels) says which channel is in which group.
    """
    extra = tl.zeros_like(mean)
    if added is not None:
        extra = tl.load(added + c, mask=known, other=0).to(tl.float32)
    mean += extra
    centre = tl.sum(tl.where(member, mean[None, :], 0.0), 1) / width
    centre = tl.sum(tl.where(member, centre[:, None], 0.0), 0)  # of each channel's group
    deviations += pixels * (mean - centre) * (mean - centre)
    variance = tl.sum(tl.where(member, deviations[None, :], 0.0), 1) / width / pixels
    inverse = tl.sum(tl.where(member, tl.rsqrt(variance + eps)[:, None], 0.0), 0)
    scale = tl.load(weight + c, mask=known, other=0).to(tl.float32) * inverse
    return scale, tl.load(bias + c, mask=known, other=0).to(tl.float32) + (extra - centre) * scale


@triton.jit
def _applied(x, scale, shift, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    y = x.to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit(do_not_specialize=["added_stride", "pixels"])
def _norm_groups(  # type: ignore[no-untyped-def]
    x, added, weight, bias, out, added_stride, pixels, channels, eps,
    SILU: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The whole norm of SPAN adjacent groups of WIDTH channels of one picture, which is read twice."""
    batch = tl.program_id(1)
    w = tl.arange(0, COLUMNS)
    c = tl.program_id(0) * (SPAN * WIDTH) + w
    known = (w < SPAN * WIDTH) & (c < channels)
    member = (w[None, :] // WIDTH == tl.arange(0, SPAN)[:, None]) & known[None, :]
    x += batch.to(tl.int64) * pixels * channels
    out += batch.to(tl.int64) * pixels * channels
    if added is not None:
        added += batch * added_stride
    mean, deviations = _channel_moments(x, c, known, pixels, channels, ROWS, COLUMNS, UNROLL)
    scale, shift = _scale_and_shift(mean, deviations, added, weight, bias, c, known, member, pixels, WIDTH, eps)
    for start in range(0, pixels, ROWS):
        r = start + tl.arange(0, ROWS)
        there = (r < pixels)[:, None] & known[None, :]
        at = r[:, None] * channels + c[None, :]
        y = _applied(tl.load(x + at, mask=there, other=0), scale, shift, SILU)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["pixels", "rows"])
def _piece_moments(  # type: ignore[no-untyped-def]
    x, out, pixels, channels, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """First pass. Moments of COLUMNS channels over a piece of `rows` pixels: out (B, pieces, 2, channels)."""
    piece, batch = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < channels
    x += (batch.to(tl.int64) * pixels + piece * rows) * channels
    count = min(rows, pixels - piece * rows)
    mean, deviations = _channel_moments(x, c, known, count, channels, ROWS, COLUMNS, UNROLL)
    out += (batch * tl.num_programs(0) + piece) * 2 * channels
    tl.store(out + c, mean, mask=known)
    tl.store(out + channels + c, deviations, mask=known)


@triton.jit(do_not_specialize=["pixels", "rows"])
def _add_with_moments(  # type: ignore[no-untyped-def]
    x, bias, residual, total, out, pixels, channels, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x + bias + residual, and what the first pass would read from it: total like x, out (B, pieces, 2, channels)."""
    piece, batch = tl.program_id(0), tl.program_id(2)
    c, r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    known = c < channels
    start = (batch.to(tl.int64) * pixels + piece * rows) * channels
    count = min(rows, pixels - piece * rows)
    extra = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        extra = tl.load(bias + c, mask=known, other=0).to(tl.float32)
    first = tl.load(x + start + c, mask=known, other=0).to(tl.float32) + extra
    first += tl.load(residual + start + c, mask=known, other=0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(0, count, ROWS):
        there = (r < count - row)[:, None] & known[None, :]
        at = start + ((row + r) * channels)[:, None] + c[None, :]
        v = tl.load(x + at, mask=there, other=0).to(tl.float32) + extra[None, :]
        v = (v + tl.load(residual + at, mask=there, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=there)
        apart = tl.where(there, v.to(tl.float32) - first[None, :], 0.0)
        sums += apart
        squares += apart * apart
    mean, deviations = _moments(first, sums, squares, count)
    out += (batch * tl.num_programs(0) + piece) * 2 * channels
    tl.store(out + c, mean, mask=known)
    tl.store(out + channels + c, deviations, mask=known)


@triton.jit(do_not_specialize=["added_stride", "pixels", "width", "rows", "pieces"])
def _fold(  # type: ignore[no-untyped-def]
    moments, added, weight, bias, out, added_stride, pixels, channels, width, rows, pieces, eps,
    PIECES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Second pass. Scale and shift of the channels of one group of one picture: out (B, 2, channels)."""
    batch, w = tl.program_id(1), tl.arange(0, COLUMNS)
    c, known = tl.program_id(0) * width + w, w < width
    moments += batch * pieces * 2 * channels
    if added is not None:
        added += batch * added_stride
    total = tl.zeros((PIECES, COLUMNS), tl.float32)
    for start in range(0, pieces, PIECES):
        p = start + tl.arange(0, PIECES)
        count = tl.minimum(pixels - p * rows, rows)[:, None]
        there = (p < pieces)[:, None] & known[None, :]
        total += count * tl.load(moments + p[:, None] * 2 * channels + c[None, :], mask=there, other=0)
    mean = tl.sum(total, 0) / pixels
    squares = tl.zeros((PIECES, COLUMNS), tl.float32)
    for start in range(0, pieces, PIECES):
        p = start + tl.arange(0, PIECES)
        count = tl.minimum(pixels - p * rows, rows)[:, None]
        there = (p < pieces)[:, None] & known[None, :]
        at = moments + p[:, None] * 2 * channels + c[None, :]
        apart = tl.where(there, tl.load(at, mask=there, other=0) - mean[None, :], 0.0)
        squares += tl.load(at + channels, mask=there, other=0) + count * apart * apart
    deviations = tl.sum(squares, 0)
    member = known[None, :]
    scale, shift = _scale_and_shift(mean, deviations, added, weight, bias, c, known, member, pixels, width, eps)
    out += batch * 2 * channels
    tl.store(out + c, scale, mask=known)
    tl.store(out + channels + c, shift, mask=known)


@triton.jit(do_not_specialize=["pixels"])
def _apply(  # type: ignore[no-untyped-def]
    x, folded, out, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Third pass. ROWS pixels of COLUMNS channels, scaled and shifted."""
    batch, first = tl.program_id(2), tl.program_id(0) * ROWS
    c, r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    known = c < channels
    folded += batch * 2 * channels
    scale = tl.load(folded + c, mask=known, other=0)
    shift = tl.load(folded + channels + c, mask=known, other=0)
    there = (r < pixels - first)[:, None] & known[None, :]
    start = (batch.to(tl.int64) * pixels + first) * channels
    at = r[:, None] * channels + c[None, :]
    y = _applied(tl.load(x + start + at, mask=there, other=0), scale, shift, SILU)
    tl.store(out + start + at, y.to(out.dtype.element_ty), mask=there)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Sizes of the three passes: about `programs` pieces times tiles of `columns` channels, `rows` pixels at a time.

    All but `programs` and `warps` are powers of two.
    """

    rows: int
    columns: int
    applied_rows: int
    programs: int
    warps: int = 4


FINE = Passes(rows=16, columns=32, applied_rows=64, programs=1056)
EVEN = Passes(rows=64, columns=64, applied_rows=64, programs=528)
ADDED = Passes(rows=32, columns=64, applied_rows=64, programs=528)
"""The fastest of those that were measured on an H200: for maps of less than some megabytes, for larger ones, and where
a residual is added.
"""

SMALL_MAP = 1 << 21
"""Numbers of a batch below which `FINE` stands first among the candidates."""

FEW_PIXELS = 1024
"""Up to here the one kernel stands first."""

LARGEST_GROUP = 1 << 17
"""Numbers of a picture's group above which the one kernel is no candidate: a multiprocessor reads them alone."""

WHOLE_TILE = 8192
"""Numbers that the one kernel reads at a time."""

UNROLL = 2
"""Tiles that are read before the sums of the first are done."""

SECTOR = 32
"""Bytes that a card reads at once."""


@dataclass(frozen=True)
class GroupNorm:
    """One call of the norm: x (B, N, C) contiguous, `added` (B or 1, C) or None, the moments of x or None."""

    x: Tensor
    norm: nn.GroupNorm
    added: Tensor | None = None
    silu: bool = True
    moments: Moments | None = None

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.norm.num_channels // self.norm.num_groups

    @property
    def span(self) -> int:
        """Groups side by side whose rows fill a sector: a power of two."""
        return triton.next_power_of_2(triton.cdiv(SECTOR, self.width * self.x.element_size()))  # type: ignore[no-any-return]

    @property
    def added_stride(self) -> int:
        """Numbers between the rows of `added`, 0 where all pictures share one."""
        return 0 if self.added is None or len(self.added) == 1 else self.added.stride(0)

    def key(self) -> str:
        """What the choice between candidates depends on."""
        given = self.added is not None, self.moments is not None, self.silu
        return f"group norm {tuple(self.x.shape)} {self.norm.num_groups} {given} {self.x.dtype}"

    def candidates(self) -> Candidates:
        """Functions that compute it, by name; the first is a good one for the size."""
        _, pixels, _ = self.x.shape
        sizes = (FINE, EVEN) if self.x.numel() <= SMALL_MAP else (EVEN, FINE)
        passes: Candidates = {f"passes {size.rows}x{size.columns}": partial(self.in_passes, size) for size in sizes}
        if pixels * self.width * self.span > LARGEST_GROUP:
            return passes
        whole: Candidates = {"whole": self.at_once}
        return {**whole, **passes} if pixels <= FEW_PIXELS else {**passes, **whole}

    def at_once(self) -> Tensor:
        """One kernel, a program for a picture's adjacent groups."""
        x, (batch, pixels, channels), norm = self.x, self.x.shape, self.norm
        out, columns = torch.empty_like(x), triton.next_power_of_2(self.span * self.width)
        _norm_groups[(triton.cdiv(norm.num_groups, self.span), batch)](
            *(x, self.added, norm.weight, norm.bias, out, self.added_stride, pixels, channels, norm.eps),
            SILU=self.silu,
            WIDTH=self.width,
            SPAN=self.span,
            ROWS=max(1, WHOLE_TILE // columns),
            COLUMNS=columns,
            UNROLL=UNROLL,
            num_warps=8,
        )
        return out

    def in_passes(self, size: Passes) -> Tensor:
        """Three kernels: moments of pieces unless they are given, a scale and shift for each channel, applying them."""
        x, (batch, pixels, channels), norm = self.x, self.x.shape, self.norm
        moments = self.moments or moments_by(x, size)
        pieces, columns = moments.values.shape[1], triton.next_power_of_2(self.width)
        folded = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)
        _fold[(norm.num_groups, batch)](
            *(moments.values, self.added, norm.weight, norm.bias, folded, self.added_stride),
            *(pixels, channels, self.width, moments.rows, pieces, norm.eps),
            PIECES=max(1, 4096 // columns),
            COLUMNS=columns,
            num_warps=4,
        )
        _apply[(triton.cdiv(pixels, size.applied_rows), triton.cdiv(channels, size.columns), batch)](
            *(x, folded, out, pixels, channels),
            SILU=self.silu,
            ROWS=size.applied_rows,
            COLUMNS=size.columns,
            num_warps=size.warps,
        )
        return out


def moments_by(x: Tensor, size: Passes) -> Moments:
    """The moments of x (B, N, C), by pieces of a size."""
    moments, grid = _pieces(x, size)
    _piece_moments[grid](
        *(x, moments.values, *x.shape[1:], moments.rows),
        ROWS=size.rows,
        COLUMNS=size.columns,
        UNROLL=UNROLL,
        num_warps=size.warps,
    )
    return moments


def added_with_moments(x: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Moments]:
    """`x + bias + residual` for x and residual (B, N, C) contiguous and bias (C,), and its moments."""
    out = torch.empty_like(x)
    moments, grid = _pieces(x, ADDED)
    _add_with_moments[grid](
        *(x, bias, residual, out, moments.values, *x.shape[1:], moments.rows),
        ROWS=ADDED.rows,
        COLUMNS=ADDED.columns,
        num_warps=ADDED.warps,
    )
    return out, moments


def _pieces(x: Tensor, size: Passes) -> tuple[Moments, tuple[int, int, int]]:
    """Place for the moments of x by pieces of a size, and the grid of programs that find them."""
    batch, pixels, channels = x.shape
    tiles = triton.cdiv(channels, size.columns)
    rows = triton.cdiv(triton.cdiv(pixels * tiles * batch, size.programs), size.rows) * size.rows
    pieces = triton.cdiv(pixels, rows)
    values = torch.empty(batch, pieces, 2, channels, dtype=torch.float32, device=x.device)
    return Moments(values, rows), (pieces, tiles, batch)
