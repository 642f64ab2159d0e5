"""Attention and transformer blocks for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.autotune import Candidates
from fewstep.engines.cache import VersionedCache
from fewstep.engines.cpu.context import LayerContext
from fewstep.engines.cpu.convolution import normed
from fewstep.engines.cpu.linear import fast_linear, gated_linear
from fewstep.engines.replace_layers import SourceLayer
from fewstep.nn.attention import Attention, PixelAttention
from fewstep.nn.transformer import GEGLU, SpatialTransformer, TransformerBlock


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, ctx: LayerContext) -> Tensor:
    """Scaled dot-product attention of rows: q (B, N, heads * D), k and v (B, M, heads * D) -> (B, N, heads * D)."""

    def plain() -> Tensor:
        split = [torch.unflatten(rows, 2, (heads, -1)).transpose(1, 2) for rows in (q, k, v)]
        return F.scaled_dot_product_attention(split[0], split[1], split[2]).transpose(1, 2).flatten(2)

    candidates: Candidates = {"plain": plain}
    if (kernels := ctx.kernels) is not None:
        candidates["kernel"] = lambda: kernels.attention(q, k, v, heads)
    return ctx.autotuner.run(f"attention {tuple(q.shape[1:])} {k.shape[1]} {heads} {kernels is not None}", candidates)


class FastAttention(nn.Module):
    """Attention that computes a text's keys and values once for each prompt.

    Without kernels queries, keys and values are one fused projection; the kernels gain nothing by it, and save memory.
    """

    def __init__(self, attention: Attention, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(attention), ctx
        self._merged, self._text_kv = VersionedCache[Tensor](), VersionedCache[tuple[Tensor, ...]]()

    def forward(self, x: Tensor, context: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        layer, ctx = self.source.layer, self.ctx
        merges = ctx.optimizations.merged_projections
        if merges and context is not None:
            q, (k, v) = fast_linear(x, layer.to_q.weight, None, ctx), self._text_kv_of(context)
        elif merges and ctx.kernels is None:
            weights = layer.to_q.weight, layer.to_k.weight, layer.to_v.weight
            merged = self._merged.get(weights, lambda: torch.cat([weight.detach() for weight in weights]))
            q, k, v = fast_linear(x, merged, None, ctx).chunk(3, dim=2)
        else:
            source = x if context is None else context
            q = fast_linear(x, layer.to_q.weight, None, ctx)
            k, v = (fast_linear(source, each.weight, None, ctx) for each in (layer.to_k, layer.to_v))
        return _out(layer.to_out, attention(q, k, v, layer.heads, ctx), ctx, residual)

    def _text_kv_of(self, context: Tensor) -> tuple[Tensor, ...]:
        layers = self.source.layer.to_k, self.source.layer.to_v

        def make() -> tuple[Tensor, ...]:
            return tuple(fast_linear(context, layer.weight, None, self.ctx) for layer in layers)

        return self._text_kv.get(tuple(layer.weight for layer in layers), make, context)


class FastPixelAttention(nn.Module):
    """The autoencoder's attention, over rows of pixels that are there already."""

    def __init__(self, attention: PixelAttention, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(attention), ctx

    def forward(self, x: Tensor) -> Tensor:
        layer, ctx = self.source.layer, self.ctx
        rows = _rows(normed(layer.group_norm, x))
        q, k, v = (fast_linear(rows, each.weight, each.bias, ctx) for each in (layer.to_q, layer.to_k, layer.to_v))
        return _map(_out(layer.to_out, attention(q, k, v, 1, ctx), ctx, _rows(x)), x)


class FastTransformerBlock(nn.Module):
    """A transformer block with residual additions and the feed-forward's gate fused into its linear layers."""

    def __init__(self, block: TransformerBlock, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(block), ctx
        self.attn1, self.attn2 = FastAttention(block.attn1, ctx), FastAttention(block.attn2, ctx)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        block = self.source.layer
        x = self.attn1(_layer_normed(block.norm1, x), residual=x)
        x = self.attn2(_layer_normed(block.norm2, x), context, residual=x)
        gated, back = block.ff.net[0], block.ff.net[2]
        assert isinstance(gated, GEGLU)
        assert isinstance(back, nn.Linear)
        h = gated_linear(_layer_normed(block.norm3, x), gated.proj.weight, gated.proj.bias, self.ctx)
        return fast_linear(h, back.weight, back.bias, self.ctx, residual=x)


class FastTransformer(nn.Module):
    """A spatial transformer over channels-last maps."""

    def __init__(self, layer: SpatialTransformer, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(layer), ctx
        blocks = (block for block in layer.transformer_blocks if isinstance(block, TransformerBlock))
        self.blocks = [FastTransformerBlock(block, ctx) for block in blocks]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        layer, ctx = self.source.layer, self.ctx
        proj_in, proj_out = layer.proj_in, layer.proj_out
        rows = fast_linear(_rows(normed(layer.norm, x)), proj_in.weight.flatten(1), proj_in.bias, ctx)
        for block in self.blocks:
            rows = block(rows, context)
        return _map(fast_linear(rows, proj_out.weight.flatten(1), proj_out.bias, ctx, residual=_rows(x)), x)


def _out(layers: nn.ModuleList, x: Tensor, ctx: LayerContext, residual: Tensor | None) -> Tensor:
    """The one linear layer in a list."""
    layer = layers[0]
    assert isinstance(layer, nn.Linear)
    return fast_linear(x, layer.weight, layer.bias, ctx, residual=residual)


def _layer_normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, HW, C)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    return torch.unflatten(rows, 1, like.shape[2:]).permute(0, 3, 1, 2)  # (B, HW, C) -> (B, C, H, W)
