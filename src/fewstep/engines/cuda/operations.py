"""Norms, gates and additions between convolutions and matrix products; `kernels.py` has them as one kernel each.

Maps are (B, N, C), pixels one after the other and channels side by side. Sums are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Of each channel over each piece of `rows` pixels of a map: mean and sum of squared deviations.

    values (B, pieces, 2, C) float32; the last piece may be shorter.
    """

    values: Tensor
    rows: int


class Operations(Protocol):
    """Two sets of the same functions: PyTorch's operations, and kernels."""

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        added: Tensor | None = None,
        *,
        silu: bool = True,
        moments: Moments | None = None,
    ) -> Tensor:
        """`norm(x + added)` for x (B, N, C) and added (B or 1, C), then SiLU; `moments` are those of x, if known."""

    def add_norm(self, x: Tensor, h: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """`x + h`, or x alone, and its norm: rows (B, N, C)."""

    def row_norm(self, x: Tensor, offset: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """`norm(x + offset)` for rows x (B, N, C) and offset (C,) in any format."""

    def gated(self, rows: Tensor) -> Tensor:
        """The first half of the channels times the GELU of the second: (..., 2C) -> (..., C)."""

    def added(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """`x + bias + residual` for x and residual (B, N, C) and bias (C,)."""

    def added_moments(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Moments | None]:
        """`added`, and the moments of its channels for `group_norm` where they save a pass over the map."""

    def weave(self, phases: Tensor, bias: Tensor | None) -> Tensor:
        """The four phases of a doubled map interleaved, plus bias (O,): (B, 4 * O, h + 1, w + 1) -> (B, O, 2h, 2w).

        Channels [(2i + j) * O, (2i + j + 1) * O) hold output pixels (2y + i, 2x + j) at (y + i, x + j).
        """


class PlainOperations:
    """The operations of PyTorch itself, on any device."""

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        added: Tensor | None = None,
        *,
        silu: bool = True,
        moments: Moments | None = None,
    ) -> Tensor:
        """See `Operations`."""
        x = x if added is None else x + added[:, None].to(x.dtype)
        out = F.group_norm(x.transpose(1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps).transpose(1, 2)
        return (F.silu(out) if silu else out).contiguous()

    def add_norm(self, x: Tensor, h: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        x = x if h is None else x + h
        return x, norm(x)

    def row_norm(self, x: Tensor, offset: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """See `Operations`."""
        out: Tensor = norm(x if offset is None else x + offset.to(x.dtype))
        return out

    def gated(self, rows: Tensor) -> Tensor:
        """See `Operations`."""
        value, gate = rows.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def added(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """See `Operations`."""
        return x + residual if bias is None else x + bias + residual

    def added_moments(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Moments | None]:
        """See `Operations`."""
        return self.added(x, bias, residual), None

    def weave(self, phases: Tensor, bias: Tensor | None) -> Tensor:
        """See `Operations`."""
        batch, channels, height, width = phases.shape
        out = phases.new_empty(batch, 2 * height - 2, 2 * width - 2, channels // 4).permute(0, 3, 1, 2)
        for phase, part in enumerate(phases.chunk(4, dim=1)):
            i, j = divmod(phase, 2)
            part = part[:, :, i : i + height - 1, j : j + width - 1]
            out[:, :, i::2, j::2] = part if bias is None else part + bias[:, None, None]
        return out


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, HW, C), without a copy where channels lie side by side."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def maps(rows: Tensor, like: Tensor) -> Tensor:
    """(B, HW, C) as (B, C, H, W), with height and width of `like`."""
    return torch.unflatten(rows, 1, like.shape[2:]).permute(0, 3, 1, 2)


def with_moments(x: Tensor, moments: Moments | None) -> Tensor:
    """`x` itself, carrying the moments of its channels to the norm that reads it.

    Nothing that is computed from x carries them, views and concatenations neither: then they are computed again.
    """
    x.channel_moments = (moments, _version(x))  # type: ignore[attr-defined]
    return x


def moments_of(x: Tensor) -> Moments | None:
    """The moments that `x` carries; None where it carries none, or was written to since."""
    moments, version = getattr(x, "channel_moments", (None, 0))
    return moments if version == _version(x) else None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
