"""Linear layers and attention on a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.engines.autotune import Candidates
from fewstep.engines.cuda.context import CudaLayerContext, Weights
from fewstep.engines.cuda.operations import PlainOperations

ATTENTION_BACKENDS: dict[str, tuple[SDPBackend, Callable[[SDPAParams], bool]]] = {
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
}
"""Implementations of attention, and whether they take a shape; the fastest is found for each."""

WIDEST_FUSED = 256
"""Channels of a head above which the fast fused kernels take none; `matmul_attention` is tried there."""

MOST_SCORES = 1 << 25
"""Scores of a piece of `matmul_attention`: 64 MB in half precision, 128 MB in float32."""


class FusedLinear:
    """Several linear layers as one, their weights concatenated: x (..., C) -> (..., sum of outputs).

    `weights` and `biases` are those of the layers; there is no bias where `biases` is None.
    """

    def __init__(self, ctx: CudaLayerContext, weights: Weights, biases: Weights | None = None) -> None:
        self._weight = _one(ctx, weights)
        self._bias = None if biases is None else _one(ctx, biases)

    @property
    def weight(self) -> Tensor:
        """The weight (O, C) as of now."""
        return self._weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,) as of now."""
        return None if self._bias is None else self._bias()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """Add the layer's output, without its bias, to `total` (..., O) in place, inside the matrix product."""
        total.view(-1, total.shape[-1]).addmm_(x.flatten(0, -2), self.weight.T)


def _one(ctx: CudaLayerContext, weights: Weights) -> Callable[[], Tensor]:
    """The weight of a single layer as it is, those of several packed into one."""
    if len(weights()) == 1:
        return lambda: joined(weights())
    packed = ctx.pack(weights, lambda: joined(weights()))
    return lambda: packed.value


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights (O, C) or (O, C, 1, 1), or biases (O,), one below the other."""
    flat = [each.flatten(1) if each.dim() > 1 else each for each in weights]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def fused_linear(ctx: CudaLayerContext, *layers: nn.Linear | nn.Conv2d, bias: bool = True) -> FusedLinear:
    """The layers fused into one: linear ones, or 1x1 convolutions."""
    biased = bias and layers[0].bias is not None

    def biases() -> list[Tensor]:
        return [layer.bias for layer in layers if layer.bias is not None]

    return FusedLinear(ctx, lambda: [layer.weight for layer in layers], biases if biased else None)


def fused_geglu(linear: FusedLinear, rows: Tensor, ctx: CudaLayerContext) -> Tensor:
    """GEGLU: half of a layer's outputs times the GELU of the other half: rows (B, N, C) -> (B, N, outputs / 2)."""

    def apart() -> Tensor:
        return ctx.operations.gated(linear(rows))

    if isinstance(ctx.operations, PlainOperations):
        return apart()
    from fewstep.engines.cuda.geglu import geglu_candidates

    weight = linear.weight
    candidates: Candidates = {"apart": apart, **geglu_candidates(rows, weight, linear.bias)}
    return ctx.autotuner.run(f"geglu {tuple(rows.shape)} {len(weight)} {rows.dtype}", candidates)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, ctx: CudaLayerContext, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention of rows: q (B, N, heads * D), k and v (B, M, heads * D) -> (B, N, heads * D)."""
    q, k, v = (torch.unflatten(rows, 2, (heads, -1)).transpose(1, 2) for rows in (q, k, v))
    fused = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)

    def by(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return _as_rows(fused())

        return run

    candidates: Candidates = {}
    if q.is_cuda and ctx.optimizations.attention:
        given = SDPAParams(q, k, v, None, 0.0, causal, False)
        candidates = {name: by(backend) for name, (backend, takes) in ATTENTION_BACKENDS.items() if takes(given)}
        if not causal and (heads == 1 or q.shape[-1] > WIDEST_FUSED):
            candidates["products"] = lambda: _as_rows(matmul_attention(q, k, v))
    candidates = candidates or {"any": lambda: _as_rows(fused())}
    return ctx.autotuner.run(f"attention {tuple(q.shape)} {k.shape[2]} {causal} {q.dtype}", candidates)


def _as_rows(heads: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, N, heads * D), a copy unless the heads of a row lie side by side."""
    return heads.transpose(1, 2).flatten(2)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, *, most_scores: int = MOST_SCORES) -> Tensor:
    """Attention as two batched products and a softmax: q (B, heads, N, D), k and v (B, heads, M, D) -> like q.

    Queries are computed in pieces with at most `most_scores` scores each, or one query a piece. The softmax is in
    float32 inside; bfloat16, whose scores would keep too few digits, has them in float32.
    """
    shape = q.shape
    q, k, v = (rows.flatten(0, 1) for rows in (q, k, v))
    piece = max(1, most_scores // (len(q) * k.shape[1]))
    out = v.new_empty(q.shape)
    for first in range(0, q.shape[1], piece):
        part = slice(first, first + piece)
        torch.bmm(_probabilities(q[:, part], k), v, out=out[:, part])
    return out.view(shape)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) for q (B, N, D) and k (B, M, D), in the format of q."""
    scale = q.shape[-1] ** -0.5
    if q.dtype != torch.bfloat16:
        return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale).softmax(-1)
    scores = torch.bmm(q * scale, k.mT, out_dtype=torch.float32) if q.is_cuda else (q.float() @ k.mT.float()) * scale
    return scores.softmax(-1).to(q.dtype)
