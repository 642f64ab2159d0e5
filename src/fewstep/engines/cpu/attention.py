"""Attention as a CPU computes it fastest, and the transformer around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.choices import Ways
from fewstep.engines.cpu.convolution import normed
from fewstep.engines.cpu.linear import fast_linear, gated_linear
from fewstep.engines.cpu.means import Means
from fewstep.engines.kept import Kept
from fewstep.nn.attention import Attention, PixelAttention
from fewstep.nn.transformer import GEGLU, SpatialTransformer, TransformerBlock


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, means: Means) -> Tensor:
    """Scaled dot-product attention of rows: q (B, N, heads * D), k and v (B, M, heads * D) -> (B, N, heads * D)."""

    def plain() -> Tensor:
        split = [torch.unflatten(rows, 2, (heads, -1)).transpose(1, 2) for rows in (q, k, v)]
        return F.scaled_dot_product_attention(split[0], split[1], split[2]).transpose(1, 2).flatten(2)

    ways: Ways = {"plain": plain}
    if (kernels := means.kernels) is not None:
        ways["kernel"] = lambda: kernels.attention(q, k, v, heads)
    return means.choices.run(f"attention {tuple(q.shape[1:])} {k.shape[1]} {heads} {kernels is not None}", ways)


class FastAttention(nn.Module):
    """Attention that computes a text's keys and values once for each prompt.

    Without kernels queries, keys and values are one product; the kernels gain nothing by it, and save the memory.
    """

    def __init__(self, attention: Attention, means: Means) -> None:
        super().__init__()
        self.attention, self.means = (attention,), means
        self._merged, self._told = Kept[Tensor](), Kept[tuple[Tensor, ...]]()

    def forward(self, x: Tensor, context: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        layer, means = self.attention[0], self.means
        merges = means.tricks.merged_projections
        if merges and context is not None:
            q, (k, v) = fast_linear(x, layer.to_q.weight, None, means), self._keys_and_values(context)
        elif merges and means.kernels is None:
            weights = layer.to_q.weight, layer.to_k.weight, layer.to_v.weight
            merged = self._merged.get(weights, lambda: torch.cat([weight.detach() for weight in weights]))
            q, k, v = fast_linear(x, merged, None, means).chunk(3, dim=2)
        else:
            source = x if context is None else context
            q = fast_linear(x, layer.to_q.weight, None, means)
            k, v = (fast_linear(source, each.weight, None, means) for each in (layer.to_k, layer.to_v))
        return _out(layer.to_out, attended(q, k, v, layer.heads, means), means, residual)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, ...]:
        layers = self.attention[0].to_k, self.attention[0].to_v

        def make() -> tuple[Tensor, ...]:
            return tuple(fast_linear(context, layer.weight, None, self.means) for layer in layers)

        return self._told.get(tuple(layer.weight for layer in layers), make, context)


class FastPixelAttention(nn.Module):
    """The autoencoder's attention, over rows of pixels that are there already."""

    def __init__(self, attention: PixelAttention, means: Means) -> None:
        super().__init__()
        self.attention, self.means = (attention,), means

    def forward(self, x: Tensor) -> Tensor:
        layer, means = self.attention[0], self.means
        rows = _rows(normed(layer.group_norm, x))
        q, k, v = (fast_linear(rows, each.weight, each.bias, means) for each in (layer.to_q, layer.to_k, layer.to_v))
        return _map(_out(layer.to_out, attended(q, k, v, 1, means), means, _rows(x)), x)


class FastTransformerBlock(nn.Module):
    """A transformer block whose additions happen inside its linear layers, as the gate of its feed-forward does."""

    def __init__(self, block: TransformerBlock, means: Means) -> None:
        super().__init__()
        self.block, self.means = (block,), means
        self.attn1, self.attn2 = FastAttention(block.attn1, means), FastAttention(block.attn2, means)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        block = self.block[0]
        x = self.attn1(_layer_normed(block.norm1, x), residual=x)
        x = self.attn2(_layer_normed(block.norm2, x), context, residual=x)
        gated, back = block.ff.net[0], block.ff.net[2]
        assert isinstance(gated, GEGLU)
        assert isinstance(back, nn.Linear)
        h = gated_linear(_layer_normed(block.norm3, x), gated.proj.weight, gated.proj.bias, self.means)
        return fast_linear(h, back.weight, back.bias, self.means, residual=x)


class FastTransformer(nn.Module):
    """A spatial transformer over channels-last maps."""

    def __init__(self, layer: SpatialTransformer, means: Means) -> None:
        super().__init__()
        self.layer, self.means = (layer,), means
        blocks = (block for block in layer.transformer_blocks if isinstance(block, TransformerBlock))
        self.blocks = [FastTransformerBlock(block, means) for block in blocks]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        (layer,), means = self.layer, self.means
        enter, leave = layer.proj_in, layer.proj_out
        rows = fast_linear(_rows(normed(layer.norm, x)), enter.weight.flatten(1), enter.bias, means)
        for block in self.blocks:
            rows = block(rows, context)
        return _map(fast_linear(rows, leave.weight.flatten(1), leave.bias, means, residual=_rows(x)), x)


def _out(layers: nn.ModuleList, x: Tensor, means: Means, residual: Tensor | None) -> Tensor:
    """The one linear layer in a list."""
    layer = layers[0]
    assert isinstance(layer, nn.Linear)
    return fast_linear(x, layer.weight, layer.bias, means, residual=residual)


def _layer_normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, HW, C)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    return torch.unflatten(rows, 1, like.shape[2:]).permute(0, 3, 1, 2)  # (B, HW, C) -> (B, C, H, W)
