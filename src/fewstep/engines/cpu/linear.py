"""Linear layers by the fastest library for the processor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.autotune import Candidates
from fewstep.engines.cpu.context import LayerContext
from fewstep.engines.replace_layers import SourceLayer


class FastLinear(nn.Module):
    """A linear layer: by the BLAS that PyTorch takes, or by oneDNN, which is twice as fast on some processors."""

    def __init__(self, layer: nn.Linear, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(layer), ctx

    @property
    def weight(self) -> Tensor:
        """That of the layer."""
        return self.source.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """That of the layer."""
        return self.source.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias, self.ctx)


def fast_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, ctx: LayerContext, *, residual: Tensor | None = None
) -> Tensor:
    """`F.linear` of x (..., C), plus a residual of its shape; weights in float16 are widened."""
    candidates: Candidates = {
        "torch": lambda: _plus(by_picture(lambda p: F.linear(p, weight.float(), floats(bias)), x, ctx), residual)
    }
    if ctx.optimizations.onednn:
        candidates["onednn"] = lambda: _plus(by_picture(lambda p: _by_onednn(p, weight, bias), x, ctx), residual)
    if (kernels := ctx.kernels) is not None and kernels.takes(weight):
        candidates["kernel"] = lambda: kernels.linear(x, weight, bias, residual=residual)
        if x.dim() == 2:  # a row a picture: libraries would round one row otherwise than several
            return candidates["kernel"]()
    return ctx.autotuner.run(f"linear {_key(x, weight, ctx)} {residual is not None}", candidates)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor, ctx: LayerContext) -> Tensor:
    """The first half of a linear layer's channels times the GELU of the second: GEGLU, arXiv:2002.05202."""
    candidates: Candidates = {
        "torch": lambda: _gated(by_picture(lambda p: F.linear(p, weight.float(), bias.float()), x, ctx))
    }
    if ctx.optimizations.onednn:
        candidates["onednn"] = lambda: _gated(by_picture(lambda p: _by_onednn(p, weight, bias), x, ctx))
    if (kernels := ctx.kernels) is not None and len(weight) % (2 * kernels.wide) == 0 and kernels.takes(weight):
        candidates["kernel"] = lambda: kernels.linear(x, weight, bias, gated=True)
    return ctx.autotuner.run(f"gated {_key(x, weight, ctx)}", candidates)


def _key(x: Tensor, weight: Tensor, ctx: LayerContext) -> str:
    """By the rows of one picture: a batch runs by the implementations that its pictures would take alone."""
    return f"{x.shape[1:-1].numel()} {tuple(weight.shape)} {weight.dtype} {ctx.kernels is not None}"


def by_picture(layer: Callable[[Tensor], Tensor], x: Tensor, ctx: LayerContext) -> Tensor:
    """`layer` of x (B, ...), a picture at a time where kernels run: libraries round otherwise in another batch.

    Without kernels all pictures at once, since what the weights cost is then paid for each.
    """
    if len(x) == 1 or x.dim() == 2 or ctx.kernels is None:
        return layer(x)
    return torch.cat([layer(x[i : i + 1]) for i in range(len(x))])


def floats(bias: Tensor | None) -> Tensor | None:
    """A bias in float32."""
    return None if bias is None else bias.float()


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.float(), floats(bias), "none", [], "")
    return out


def _plus(out: Tensor, residual: Tensor | None) -> Tensor:
    return out if residual is None else out.add_(residual)


def _gated(rows: Tensor) -> Tensor:
    value, gate = rows.chunk(2, dim=-1)
    return value * F.gelu(gate)
