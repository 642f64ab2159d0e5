"""Layers of the networks in few kernels; each reads the parameters of the layer that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.autotune import Candidates
from fewstep.engines.cuda.context import CudaLayerContext, PackedWeight
from fewstep.engines.cuda.linear import attention, fused_geglu, fused_linear
from fewstep.engines.cuda.operations import PlainOperations, maps, moments_of, pixels, with_moments
from fewstep.engines.replace_layers import SourceLayer
from fewstep.models.text_encoder import TextLayer
from fewstep.models.tiny_autoencoder import TinyBlock
from fewstep.models.unet import UNet
from fewstep.nn.attention import Attention, PixelAttention
from fewstep.nn.convolution import Upsample
from fewstep.nn.resblock import ResBlock
from fewstep.nn.transformer import GEGLU, SpatialTransformer, TransformerBlock

PADDED_OUTPUTS = 16, 64
"""Outputs that are tried for convolutions with fewer than the first."""


class CudaConv(nn.Module):
    """A convolution, with norm and SiLU before it in few kernels."""

    def __init__(self, conv: nn.Conv2d, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(conv), ctx
        sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        self.is_3x3 = sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"
        few = self.is_3x3 and conv.out_channels < min(PADDED_OUTPUTS)
        self.padded = [_Padded(conv, outputs, ctx) for outputs in PADDED_OUTPUTS if few]
        self._filters = channels_last(conv, ctx)

    @property
    def weight(self) -> Tensor:
        """The filters of the convolution, channels last."""
        return self._filters.value

    @property
    def padding(self) -> str | tuple[int, ...]:
        """That of the convolution."""
        return self.source.layer.padding

    def forward(self, x: Tensor) -> Tensor:
        padded: Candidates = {f"padded {each.outputs}": partial(each, x) for each in self.padded}
        return self._fastest(x, self.source.layer.bias, padded)

    def bare(self, x: Tensor) -> Tensor:
        """The convolution without its bias, which the next kernel adds."""
        return self._fastest(x, None, {})

    def _fastest(self, x: Tensor, bias: Tensor | None, more: Candidates) -> Tensor:
        """The library's convolution, one of `more`, or for small maps a kernel's, whichever is the fastest."""
        conv = self.source.layer

        def library() -> Tensor:
            return F.conv2d(x, self.weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

        if not self.is_3x3 or isinstance(self.ctx.operations, PlainOperations):
            return library()
        from fewstep.engines.cuda.small_conv import small_conv_candidates

        candidates: Candidates = {"library": library, **more, **small_conv_candidates(x, self.weight, bias)}
        key = f"conv {tuple(x.shape)} {len(self.weight)} {bias is not None} {x.dtype}"
        return self.ctx.autotuner.run(key, candidates)

    def normed(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """The convolution of `silu(norm(x))`."""
        return self.forward(maps(self.ctx.operations.group_norm(pixels(x), norm, moments=moments_of(x)), x))


def channels_last(conv: nn.Conv2d, ctx: CudaLayerContext) -> PackedWeight:
    """The filters of a convolution as cuDNN's fast kernels read them: themselves where they lie so, else a copy."""
    return ctx.pack(lambda: [conv.weight], lambda: conv.weight.contiguous(memory_format=torch.channels_last))


class _Padded:
    """A convolution padded with zero filters to more outputs, which are cut off: fast kernels want that many."""

    def __init__(self, conv: nn.Conv2d, outputs: int, ctx: CudaLayerContext) -> None:
        self.outputs, self.used, more = outputs, conv.out_channels, outputs - conv.out_channels
        self.weight = ctx.pack(
            lambda: [conv.weight],
            lambda: F.pad(conv.weight, (0,) * 7 + (more,)).contiguous(memory_format=torch.channels_last),
        )
        self.bias = (
            None
            if conv.bias is None
            else ctx.pack(lambda: _biases([conv]), lambda: F.pad(_biases([conv])[0], (0, more)))
        )

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.value
        return F.conv2d(x, self.weight.value, bias, padding=1)[:, : self.used]


class UpsampleConv(nn.Module):
    """Nearest-neighbour 2x upsampling and a 3x3 convolution, as four 2x2 ones of the small map: 4/9 of the products."""

    def __init__(self, conv: nn.Conv2d, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source, self.ctx, self.whole = SourceLayer(conv), ctx, CudaConv(conv, ctx)
        self.phase_filters = ctx.pack(lambda: [conv.weight], lambda: _four_filters(conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        conv = self.source.layer

        def plain() -> Tensor:
            return self.whole(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]

        if not self.ctx.optimizations.upsampled:
            return plain()
        candidates: Candidates = {"folded": lambda: self._phases(x)} | ({"plain": plain} if x.is_cuda else {})
        return self.ctx.autotuner.run(f"doubled {tuple(x.shape)} {len(conv.weight)} {x.dtype}", candidates)

    def _phases(self, x: Tensor) -> Tensor:
        """Runs the four phase convolutions as one with 4 * O channels, then interleaves them and adds the bias."""
        phases = F.conv2d(x, self.phase_filters.value, padding=1)
        return self.ctx.operations.weave(phases, self.source.layer.bias)


def _four_filters(weight: Tensor) -> Tensor:
    """Filters (4 * O, C, 2, 2) for the four phases: taps that would read the same pixel of the small map are added."""
    filters = [each for row in _halves(weight.float(), 2) for each in _halves(row, 3)]
    return torch.cat(filters).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps along `dim` as two, for the even output pixels and for the odd ones."""
    first, middle, last = torch.split(weight, 1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


class CudaUpsample(nn.Module):
    """2x upsampling and its convolution, fused where the size is exactly doubled."""

    def __init__(self, layer: Upsample, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.upsample, self.conv = UpsampleConv(layer.conv, ctx), CudaConv(layer.conv, ctx)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.upsample(x)  # type: ignore[no-any-return]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # type: ignore[no-any-return]


class CudaResBlock(nn.Module):
    """A residual block in few kernels.

    conv1's bias and the time embedding are added inside norm2's kernel; conv2's bias inside the residual add. `emb` is
    the output of `FusedTimeProjections`: every block reads the channels `part` of it.
    """

    def __init__(self, block: ResBlock, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source, self.ctx, self.part = SourceLayer(block), ctx, slice(0, 0)
        self.conv1, self.conv2 = CudaConv(block.conv1, ctx), CudaConv(block.conv2, ctx)
        self.shortcut = fused_linear(ctx, block.conv_shortcut) if block.conv_shortcut else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        block, operations, rows = self.source.layer, self.ctx.operations, pixels(x)
        bias = block.conv1.bias
        assert bias is not None
        added = bias[None] if emb is None else emb[:, self.part]
        h = pixels(self.conv1.bare(maps(operations.group_norm(rows, block.norm1, moments=moments_of(x)), x)))
        h = pixels(self.conv2.bare(maps(operations.group_norm(h, block.norm2, added), x)))
        out, moments = operations.added_moments(h, block.conv2.bias, self.shortcut(rows) if self.shortcut else rows)
        return with_moments(maps(out, x), moments)


class FusedTimeProjections:
    """The time projections of all residual blocks of a UNet as one linear layer: emb (B, E) -> (B, sum of channels).

    It includes the biases of the blocks' first convolutions.
    """

    def __init__(self, unet: UNet, blocks: list[CudaResBlock], ctx: CudaLayerContext) -> None:
        self.unet = unet
        layers = [block.source.layer for block in blocks]
        self.linear = fused_linear(ctx, *[layer.time_emb_proj for layer in layers if layer.time_emb_proj], bias=False)
        both = [(layer.time_emb_proj, layer.conv1) for layer in layers]

        def biases() -> list[Tensor]:
            return [each.bias for pair in both for each in pair if each is not None and each.bias is not None]

        self.bias = ctx.pack(biases, lambda: torch.cat([_sum(*pair) for pair in both]))
        ends = accumulate((layer.conv1.out_channels for layer in layers), initial=0)
        for block, (start, stop) in zip(blocks, pairwise(ends), strict=True):
            block.part = slice(start, stop)

    def __call__(self, t: Tensor, dtype: torch.dtype, pooled: Tensor | None, sizes: Tensor | None) -> Tensor:
        emb = UNet.embedding(self.unet, t, dtype, pooled, sizes)
        return self.linear(F.silu(emb)) + self.bias.value


def _sum(projection: nn.Linear | None, conv: nn.Conv2d) -> Tensor:
    assert projection is not None
    assert conv.bias is not None
    return projection.bias + conv.bias


class CudaAttention(nn.Module):
    """Attention of a UNet: self-attention with fused q, k, v, or cross attention to `part` of a text's k and v."""

    def __init__(self, attention: Attention, ctx: CudaLayerContext, *, text: bool) -> None:
        super().__init__()
        self.source, self.ctx, self.part = SourceLayer(attention), ctx, slice(0, 0)
        inner = [attention.to_q] if text else [attention.to_q, attention.to_k, attention.to_v]
        self.project_in, self.project_out = (
            fused_linear(ctx, *inner),
            fused_linear(ctx, _linear(attention.to_out[0]), bias=False),
        )

    def add_to(self, total: Tensor, x: Tensor, text_kv: Tensor | None = None) -> None:
        """Add the attention of normed rows x, without its last bias, to `total` in place: both (B, N, C)."""
        rows = self.project_in(x)
        q, k, v = rows.chunk(3, dim=2) if text_kv is None else (rows, *text_kv[..., self.part].chunk(2, dim=2))
        self.project_out.add_to(total, attention(q, k, v, self.source.layer.heads, self.ctx))


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return layer


class CudaTransformerBlock(nn.Module):
    """A transformer block, whose matrix products add to the residual rows in place.

    Their biases are left out: `offsets` has the sums of those before each of the three norms, which add them.
    """

    def __init__(self, block: TransformerBlock, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source, self.ctx, self.offsets = SourceLayer(block), ctx, list[Callable[[], Tensor | None]]()
        self.attn1 = CudaAttention(block.attn1, ctx, text=False)
        self.attn2 = CudaAttention(block.attn2, ctx, text=True)
        gated, back = block.ff.net[0], _linear(block.ff.net[2])
        assert isinstance(gated, GEGLU)
        self.ff_in, self.ff_out = fused_linear(ctx, gated.proj), fused_linear(ctx, back, bias=False)
        self.biased = [_linear(block.attn1.to_out[0]), _linear(block.attn2.to_out[0]), back]

    def add_to(self, x: Tensor, text_kv: Tensor) -> None:
        """Add all that the block adds, but for its biases, to x (B, N, C) in place."""
        norms = (self.source.layer.norm1, self.source.layer.norm2, self.source.layer.norm3)
        normed = (self.ctx.operations.row_norm(x, find(), n) for find, n in zip(self.offsets, norms, strict=True))
        self.attn1.add_to(x, next(normed))
        self.attn2.add_to(x, next(normed), text_kv)
        self.ff_out.add_to(x, fused_geglu(self.ff_in, next(normed), self.ctx))


class CudaTransformer(nn.Module):
    """A spatial transformer over channels-last maps; the context is the output of `CrossAttentionKV`."""

    def __init__(self, layer: SpatialTransformer, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(layer), ctx
        self.proj_in, self.proj_out = fused_linear(ctx, layer.proj_in), fused_linear(ctx, layer.proj_out, bias=False)
        blocks = [block for block in layer.transformer_blocks if isinstance(block, TransformerBlock)]
        self.chain = [CudaTransformerBlock(block, ctx) for block in blocks]
        self.blocks, biased = nn.ModuleList(self.chain), list[nn.Linear]()
        for each in self.chain:
            for linear in each.biased:
                each.offsets.append(_sum_of_biases(biased, ctx))
                biased = [*biased, linear]
        out = layer.proj_out
        self.bias = ctx.pack(lambda: [*_biases([*biased, out]), out.weight], lambda: _bias_after(out, biased))

    def forward(self, x: Tensor, text_kv: Tensor) -> Tensor:
        operations, rows = self.ctx.operations, pixels(x)
        h = self.proj_in(operations.group_norm(rows, self.source.layer.norm, silu=False, moments=moments_of(x)))
        for block in self.chain:
            block.add_to(h, text_kv)
        return maps(operations.added(self.proj_out(h), self.bias.value, rows), x)


def _sum_of_biases(layers: Sequence[nn.Linear], ctx: CudaLayerContext) -> Callable[[], Tensor | None]:
    if not layers:
        return lambda: None
    found = ctx.pack(lambda: _biases(layers), lambda: torch.stack(_biases(layers)).float().sum(0))
    return lambda: found.value


def _bias_after(last: nn.Linear | nn.Conv2d, layers: Sequence[nn.Linear]) -> Tensor:
    """The bias of `last` with what it makes of the biases of the layers before, in float32 inside."""
    before = torch.stack(_biases(layers)).float().sum(0)
    return (torch.stack(_biases([last]))[0].float() + last.weight.flatten(1).float() @ before).to(last.weight.dtype)


def _biases(layers: Sequence[nn.Linear | nn.Conv2d]) -> list[Tensor]:
    return [layer.bias for layer in layers if layer.bias is not None]


class CrossAttentionKV:
    """Keys and values of a text for all cross attentions, as one linear layer: context (B, M, D) -> (B, M, sum)."""

    def __init__(self, layers: list[CudaAttention], ctx: CudaLayerContext) -> None:
        inner = [each for layer in layers for each in (layer.source.layer.to_k, layer.source.layer.to_v)]
        self.linear = fused_linear(ctx, *inner)
        ends = accumulate((2 * layer.source.layer.to_k.out_features for layer in layers), initial=0)
        for layer, (start, stop) in zip(layers, pairwise(ends), strict=True):
            layer.part = slice(start, stop)

    def __call__(self, context: Tensor) -> Tensor:
        return self.linear(context)


class CudaPixelAttention(nn.Module):
    """The autoencoder's attention, queries, keys and values by one linear layer."""

    def __init__(self, attention: PixelAttention, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(attention), ctx
        self.qkv = fused_linear(ctx, attention.to_q, attention.to_k, attention.to_v)
        self.out = fused_linear(ctx, _linear(attention.to_out[0]))

    def forward(self, x: Tensor) -> Tensor:
        rows, operations = pixels(x), self.ctx.operations
        normed = operations.group_norm(rows, self.source.layer.group_norm, silu=False, moments=moments_of(x))
        q, k, v = self.qkv(normed).chunk(3, dim=2)
        out, moments = operations.added_moments(self.out(attention(q, k, v, 1, self.ctx)), None, rows)
        return with_moments(maps(out, x), moments)


class CudaTextLayer(nn.Module):
    """A layer of a text tower: queries, keys and values by one linear layer, additions fused with the norms."""

    def __init__(self, layer: TextLayer, ctx: CudaLayerContext) -> None:
        super().__init__()
        attention = layer.self_attn
        self.source, self.ctx = SourceLayer(layer), ctx
        self.qkv = fused_linear(ctx, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = fused_linear(ctx, attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        layer, operations = self.source.layer, self.ctx.operations
        heads, causal = layer.self_attn.heads, layer.self_attn.causal
        q, k, v = self.qkv(operations.add_norm(x, None, layer.layer_norm1)[1]).chunk(3, dim=2)
        h = self.out(attention(q, k, v, heads, self.ctx, causal=causal))
        x, normed = operations.add_norm(x, h, layer.layer_norm2)
        out: Tensor = x + layer.mlp(normed)
        return out


class CudaTinyBlock(nn.Module):
    """A block of the tiny autoencoder: bias, residual and ReLU inside cuDNN's convolutions."""

    def __init__(self, block: TinyBlock, ctx: CudaLayerContext) -> None:
        super().__init__()
        self.source = SourceLayer(block)
        self.filters = [channels_last(conv, ctx) for conv in block.conv if isinstance(conv, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return self.source.layer(x)  # type: ignore[no-any-return]
        biases, h = [conv.bias for conv in self.source.layer.conv if isinstance(conv, nn.Conv2d)], x
        for filters, bias in zip(self.filters[:2], biases[:2], strict=True):
            h = torch.cudnn_convolution_relu(h, filters.value, bias, (1, 1), (1, 1), (1, 1), 1)
        last = self.filters[2].value
        return torch.cudnn_convolution_add_relu(h, last, x, 1.0, biases[2], (1, 1), (1, 1), (1, 1), 1)
