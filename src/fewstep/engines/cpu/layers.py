"""The layers of the family as a CPU computes them fastest; each stands for a plain one and reads its weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.cpu.choices import Choices
from fewstep.engines.cpu.winograd import (
    UPSAMPLED,
    WINOGRAD,
    Activation,
    Products,
    Scheme,
    conv3x3,
    products_by_onednn,
    products_by_torch,
    transformed_weight,
)
from fewstep.nn.attention import Attention, PixelAttention
from fewstep.nn.convolution import Upsample
from fewstep.nn.resblock import ResBlock
from fewstep.nn.transformer import SpatialTransformer

FEWEST_CHANNELS = 32
"""Convolutions with fewer channels on either side stay plain: the transforms would cost more than the products."""


@dataclass(kw_only=True)
class Means:
    """What the fast layers share: the choices of ways, and how many bytes of transformed weights may be kept."""

    choices: Choices
    budget: int
    scheme: Scheme = WINOGRAD
    kept: dict[int, Tensor] = field(default_factory=dict)


class FastLinear(nn.Module):
    """A linear layer: by the BLAS that PyTorch takes, or by oneDNN, which is twice as fast on some processors."""

    def __init__(self, layer: nn.Linear, means: Means) -> None:
        super().__init__()
        self.layer, self.means = (layer,), means  # in a tuple, so as not to be a submodule

    @property
    def weight(self) -> Tensor:
        """That of the layer."""
        return self.layer[0].weight

    @property
    def bias(self) -> Tensor | None:
        """That of the layer."""
        return self.layer[0].bias

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias, self.means)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None, means: Means) -> Tensor:
    """`F.linear` by the faster of two libraries."""
    rows = x.numel() // x.shape[-1]
    return means.choices.run(
        f"linear {rows} {tuple(weight.shape)}",
        {
            "torch": lambda: F.linear(x, weight, bias),
            "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
        },
    )


def _linear_of(layers: nn.ModuleList, x: Tensor, means: Means) -> Tensor:
    """The one linear layer in a list."""
    layer = layers[0]
    assert isinstance(layer, nn.Linear)
    return fast_linear(x, layer.weight, layer.bias, means)


class FastConv(nn.Module):
    """A 3x3 convolution of stride 1 with all that comes before and after it: norm, SiLU, a residual."""

    def __init__(self, conv: nn.Conv2d, means: Means, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.conv, self.means, self.scheme = (conv,), means, scheme or means.scheme
        self._stored: tuple[tuple[int, int], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """That of the convolution."""
        return self.conv[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.after(None, x)

    def after(self, norm: nn.GroupNorm | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution of `silu(norm(x))`, or of x without a norm, plus the residual."""
        conv = self.conv[0]

        def direct() -> Tensor:
            h = x if norm is None else F.silu(norm(x), inplace=True)
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if self.scheme is UPSAMPLED else h
            out = F.conv2d(h, conv.weight, conv.bias, padding=1)
            return out if residual is None else out.add_(residual)

        def fast(products: Products) -> Tensor:
            enter, weight = None if norm is None else normed_silu(x, norm), self._transformed()
            return conv3x3(x, weight, conv.bias, self.scheme, products=products, activate=enter, residual=residual)

        key = f"conv {len(self.scheme.taps)} {tuple(x.shape)} {len(conv.weight)} {norm is None}"
        ways = {
            "direct": direct,
            "fewer products": lambda: fast(products_by_torch),
            "fewer products, onednn": lambda: fast(products_by_onednn),
        }
        return self.means.choices.run(key, ways)

    def _transformed(self) -> Tensor:
        """The transformed weight: the one kept, as long as the weight is what it was, or a new one."""
        weight = self.conv[0].weight
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._stored is not None and self._stored[0] == state:
            return self._stored[1]
        with torch.inference_mode(False):
            made = transformed_weight(weight, self.scheme)
        if made.nbytes <= self.means.budget or self._stored is not None:
            self.means.budget -= 0 if self._stored is not None else made.nbytes
            self._stored = (state, made)
        return made


def normed_silu(x: Tensor, norm: nn.GroupNorm) -> Activation:
    """`silu(norm(.))` of rows of x (B, C, H, W): the statistics now, the rest on the rows' way into a convolution."""
    scale, shift = norm_as_affine(x, norm)

    def activate(pictures: slice, rows: Tensor, out: Tensor) -> None:
        torch.addcmul(shift[pictures], rows, scale[pictures], out=out)
        F.silu(out, inplace=True)

    return activate


def norm_as_affine(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, 1, 1, C) that make `norm(x)` of x (B, C, H, W) in channels-last memory."""
    batch, channels = x.shape[:2]
    pixels = x.permute(0, 2, 3, 1).reshape(batch, -1, channels)
    total, squares = (torch.zeros(batch, channels, dtype=torch.float64) for _ in range(2))
    for block in torch.split(
        pixels, max(1, (1 << 19) // channels), dim=1
    ):  # sums of float32 that stay accurate, in the cache
        total += block.sum(1)
        squares += (block * block).sum(1)
    count = pixels.shape[1] * channels // norm.num_groups
    mean = total.view(batch, norm.num_groups, -1).sum(2, keepdim=True) / count
    mean_square = squares.view(batch, norm.num_groups, -1).sum(2, keepdim=True) / count
    inverse = (mean_square - mean.square() + norm.eps).rsqrt()
    shape = (batch, norm.num_groups, channels // norm.num_groups)
    scale = (inverse.expand(shape).reshape(batch, channels) * norm.weight).float()
    shift = (norm.bias - mean.expand(shape).reshape(batch, channels) * scale).float()
    return scale[:, None, None], shift[:, None, None]


class FastUpsample(nn.Module):
    """Doubling and its convolution without the enlarged map, where the size is exactly doubled."""

    def __init__(self, layer: Upsample, means: Means) -> None:
        super().__init__()
        self.layer, self.conv = (layer,), FastConv(layer.conv, means, UPSAMPLED)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv.after(None, x)
        doubled: Tensor = self.layer[0](x, size)
        return doubled


class FastResBlock(nn.Module):
    """A residual block whose norms and additions happen inside its convolutions."""

    def __init__(self, block: ResBlock, means: Means) -> None:
        super().__init__()
        self.block, self.means = (block,), means
        self.conv1, self.conv2 = FastConv(block.conv1, means), FastConv(block.conv2, means)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        block = self.block[0]
        h = self.conv1.after(block.norm1, x)
        if block.time_emb_proj is not None and emb is not None:
            h += block.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv2.after(block.norm2, h, self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        conv = self.block[0].conv_shortcut
        return x if conv is None else _pixelwise(x, conv, self.means)


def _pixelwise(x: Tensor, conv: nn.Conv2d, means: Means) -> Tensor:
    """A 1x1 convolution of x (B, C, H, W)."""
    return means.choices.run(
        f"pixelwise {tuple(x.shape)} {len(conv.weight)}",
        {
            "direct": lambda: F.conv2d(x, conv.weight, conv.bias),
            "linear": lambda: fast_linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias, means).permute(
                0, 3, 1, 2
            ),
        },
    )


class FastAttention(nn.Module):
    """Attention with one product for queries, keys and values; those of the text once for each prompt."""

    def __init__(self, attention: Attention, means: Means) -> None:
        super().__init__()
        self.attention, self.means = (attention,), means
        self._merged: tuple[tuple[int, ...], Tensor] | None = None
        self._told: tuple[weakref.ref[Tensor], tuple[int, ...], Tensor, Tensor] | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        layer = self.attention[0]
        if context is None:
            weight = self._weight(layer.to_q.weight, layer.to_k.weight, layer.to_v.weight)
            rows = fast_linear(x, weight, None, self.means).chunk(3, dim=2)
            q, k, v = (self._heads(row) for row in rows)
        else:
            q = self._heads(fast_linear(x, layer.to_q.weight, None, self.means))
            k, v = self._keys_and_values(context)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return _linear_of(layer.to_out, mixed, self.means)

    def _heads(self, rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 2, (self.attention[0].heads, -1)).transpose(1, 2)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.attention[0]
        state = _state(layer.to_k.weight, layer.to_v.weight)
        if self._told is not None and self._told[0]() is context and self._told[1] == state:
            return self._told[2], self._told[3]
        weight = self._weight(layer.to_k.weight, layer.to_v.weight)
        k, v = (self._heads(row) for row in fast_linear(context, weight, None, self.means).chunk(2, dim=2))
        self._told = (weakref.ref(context), state, k, v)
        return k, v

    def _weight(self, *weights: Tensor) -> Tensor:
        """The weights, one above the other."""
        state = _state(*weights)
        if self._merged is None or self._merged[0] != state:
            self._merged = (state, torch.cat([weight.detach() for weight in weights]))
        return self._merged[1]


def _state(*weights: Tensor) -> tuple[int, ...]:
    """What changes when weights do."""
    return tuple(n for w in weights for n in (w.data_ptr(), 0 if w.is_inference() else w._version))


class FastTransformer(nn.Module):
    """A spatial transformer over channels-last maps, whose rows of pixels are there already."""

    def __init__(self, layer: SpatialTransformer, blocks: nn.ModuleList, means: Means) -> None:
        super().__init__()
        self.layer, self.transformer_blocks, self.means = (layer,), blocks, means

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        layer = self.layer[0]
        rows = layer.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        rows = fast_linear(rows, layer.proj_in.weight.flatten(1), layer.proj_in.bias, self.means)
        for block in self.transformer_blocks:
            rows = block(rows, context)
        rows = fast_linear(rows, layer.proj_out.weight.flatten(1), layer.proj_out.bias, self.means)
        return x + torch.unflatten(rows, 1, x.shape[2:]).permute(0, 3, 1, 2)


class FastPixelAttention(nn.Module):
    """The autoencoder's attention, with one product for queries, keys and values."""

    def __init__(self, attention: PixelAttention, means: Means) -> None:
        super().__init__()
        self.attention, self.means = (attention,), means

    def forward(self, x: Tensor) -> Tensor:
        layer = self.attention[0]
        rows = layer.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # (B, 1, HW, C)
        q, k, v = (
            fast_linear(rows, each.weight, each.bias, self.means) for each in (layer.to_q, layer.to_k, layer.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + torch.unflatten(_linear_of(layer.to_out, mixed, self.means), 1, x.shape[2:]).permute(0, 3, 1, 2)
