"""Convolutions for CPUs, with fused norm, SiLU, residual and ReLU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.autotune import Candidates
from fewstep.engines.cache import VersionedCache
from fewstep.engines.cpu.compiled import Kernels
from fewstep.engines.cpu.context import LayerContext
from fewstep.engines.cpu.linear import by_picture, fast_linear, floats
from fewstep.engines.cpu.winograd import (
    STRICT,
    UPSAMPLED,
    WINOGRAD,
    Activation,
    Products,
    conv3x3,
    products_by_onednn,
    products_by_torch,
    transformed_weight,
)
from fewstep.engines.replace_layers import SourceLayer
from fewstep.models.tiny_autoencoder import TinyBlock
from fewstep.nn.convolution import Downsample, Upsample
from fewstep.nn.resblock import ResBlock

FEWEST_CHANNELS = 32
"""Convolutions with fewer channels on either side stay plain: the transforms would cost more than the products."""

FEW_CHANNELS = 9
"""Input channels of a network's first convolution, at most: latents, or with a mask and masked latents."""

FEWEST_PIXELS = 128
"""With fewer, tiles of 2x2 are the faster ones: transforming the filters for larger ones would be most of the work."""


@dataclass(frozen=True)
class ConvEpilogue:
    """What is fused after a convolution: `added` (B, O) for each channel, a residual, ReLU.

    `inplace`: nobody else needs the residual, and the result may be written into its memory.
    """

    added: Tensor | None = None
    residual: Tensor | None = None
    inplace: bool = False
    relu: bool = False

    def apply(self, out: Tensor) -> Tensor:
        """Apply it to the output of the bare convolution, in place."""
        out = out if self.added is None else out.add_(self.added[:, :, None, None])
        out = out if self.residual is None else out.add_(self.residual)
        return out.relu_() if self.relu else out


class FastConv(nn.Module):
    """A 3x3 convolution of stride 1, after 2x upsampling if `upsample`, with fused norm, SiLU and epilogue."""

    def __init__(self, conv: nn.Conv2d, ctx: LayerContext, *, upsample: bool = False) -> None:
        super().__init__()
        self.source, self.ctx, self.upsample = SourceLayer(conv), ctx, upsample
        self.scheme = UPSAMPLED if upsample else STRICT if ctx.strict else WINOGRAD
        self._transformed = VersionedCache[Tensor]()

    @property
    def weight(self) -> Tensor:
        """That of the convolution."""
        return self.source.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(None, x)

    def normed(
        self,
        norm: nn.GroupNorm | None,
        x: Tensor,
        *,
        added: Tensor | None = None,
        residual: Tensor | None = None,
        inplace: bool = False,
        relu: bool = False,
    ) -> Tensor:
        """The convolution of `silu(norm(x))`, or of x without a norm, and its epilogue: see `ConvEpilogue`."""
        epilogue, ctx = ConvEpilogue(added, residual, inplace, relu), self.ctx
        if norm is not None and not ctx.optimizations.fused_norms:
            x, norm = F.silu(normed(norm, x), inplace=True), None
        if not (ctx.optimizations.upsampled if self.upsample else ctx.optimizations.fewer_products):
            return self._direct(x, norm, epilogue)
        if ctx.kernels is not None and ctx.kernels.takes(self.weight):
            return self._compiled(ctx.kernels, x, norm, epilogue)
        if min(self.weight.shape[:2]) < FEWEST_CHANNELS:
            return self._direct(x, norm, epilogue)
        candidates: Candidates = {"direct": lambda: self._direct(x, norm, epilogue)}
        candidates["fewer products"] = lambda: self._plain(products_by_torch, x, norm, epilogue)
        if ctx.optimizations.onednn:
            candidates["fewer products, onednn"] = lambda: self._plain(products_by_onednn, x, norm, epilogue)
        scheme = "doubled" if self.upsample else "strict" if ctx.strict else "plain"
        return ctx.autotuner.run(
            f"conv {scheme} {tuple(x.shape[1:])} {len(self.weight)} {norm is not None}", candidates
        )

    def _direct(self, x: Tensor, norm: nn.GroupNorm | None, epilogue: ConvEpilogue) -> Tensor:
        kernels, bias, (outputs, channels) = self.ctx.kernels, self.source.layer.bias, self.weight.shape[:2]
        if kernels is not None and channels <= FEW_CHANNELS and outputs % kernels.wide == 0 and bias is not None:
            assert norm is None
            return epilogue.apply(kernels.conv3x3_small_cin(x, self.weight, bias))
        h = x if norm is None else F.silu(normed(norm, x), inplace=True)
        h = F.interpolate(h, scale_factor=2.0, mode="nearest") if self.upsample else h
        weight, bias = self.weight.float(), floats(bias)
        return epilogue.apply(by_picture(lambda p: F.conv2d(p, weight, bias, padding=1), h, self.ctx))

    def _plain(self, products: Products, x: Tensor, norm: nn.GroupNorm | None, epilogue: ConvEpilogue) -> Tensor:
        """With fewer products, in tensor operations."""
        activate, bias = None if norm is None else normed_silu(x, norm), floats(self.source.layer.bias)
        more = epilogue.residual
        out = conv3x3(x, self._weight(), bias, self.scheme, products=products, activate=activate, residual=more)
        return replace(epilogue, residual=None).apply(out)

    def _compiled(self, kernels: Kernels, x: Tensor, norm: nn.GroupNorm | None, epilogue: ConvEpilogue) -> Tensor:
        """With fewer products, by the kernels, which were faster than the definition at all shapes of the family."""
        pixels, bias, added = x.shape[2] * x.shape[3], self.source.layer.bias, epilogue.added
        affine = None if norm is None else affine_of(kernels.sums(x), pixels, norm)
        whole = bias if added is None else added if bias is None else bias + added
        scheme = "upsampled" if self.upsample else _scheme(x, self.ctx)
        return kernels.conv3x3(
            *(x, self.weight, whole, scheme),
            affine=affine,
            residual=epilogue.residual,
            inplace=epilogue.inplace,
            relu=epilogue.relu,
        )

    def _weight(self) -> Tensor:
        """The transformed weight: the one kept, as long as the weight is what it was, or a new one."""
        weight, ctx = self.weight, self.ctx

        def make() -> Tensor:
            with torch.inference_mode(False):
                return transformed_weight(weight.float(), self.scheme)

        size = 4 * weight.numel() // 9 * len(self.scheme.filter_transform) ** 2
        return self._transformed.get((weight,), make) if ctx.reserve(self, size) else make()


def _scheme(x: Tensor, ctx: LayerContext) -> str:
    """The kernels' scheme for maps of this size, whatever the batch."""
    return "strict" if ctx.strict or x.shape[2] * x.shape[3] < FEWEST_PIXELS else "winograd"


def normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """`norm(x)` in float32."""
    return F.group_norm(x, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)


def normed_silu(x: Tensor, norm: nn.GroupNorm) -> Activation:
    """`silu(norm(.))` of rows of x (B, C, H, W): the statistics now, the rest on the rows' way into a convolution."""
    scale, shift = affine_of(sums_of(x), x.shape[2] * x.shape[3], norm)

    def activate(pictures: slice, rows: Tensor, out: Tensor) -> None:
        torch.addcmul(shift[pictures], rows, scale[pictures], out=out)
        F.silu(out, inplace=True)

    return activate


def sums_of(x: Tensor) -> Tensor:
    """Sum and sum of squares of each channel of x (B, C, H, W): (B, 2, C) float64."""
    batch, channels = x.shape[:2]
    pixels = x.permute(0, 2, 3, 1).reshape(batch, -1, channels)
    sums = torch.zeros(batch, 2, channels, dtype=torch.float64)
    for block in torch.split(pixels, max(1, (1 << 19) // channels), dim=1):  # sums that stay accurate, in the cache
        sums[:, 0] += block.sum(1)
        sums[:, 1] += (block * block).sum(1)
    return sums


def affine_of(sums: Tensor, pixels: int, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, 1, 1, C) that do what `norm` does to a map of `pixels` with these sums (B, 2, C)."""
    batch, _, channels = sums.shape
    width = channels // norm.num_groups
    mean, mean_square = (torch.unflatten(sums, 2, (-1, width)).sum(3, keepdim=True) / (width * pixels)).unbind(1)
    inverse = (mean_square - mean.square() + norm.eps).rsqrt()
    scale = inverse.expand(-1, -1, width).reshape(batch, channels) * norm.weight
    shift = norm.bias - mean.expand(-1, -1, width).reshape(batch, channels) * scale
    return scale.float()[:, None, None], shift.float()[:, None, None]


class FastPointwise(nn.Module):
    """A 1x1 convolution."""

    def __init__(self, conv: nn.Conv2d, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(conv), ctx

    def forward(self, x: Tensor) -> Tensor:
        return _pixelwise(x, self.source.layer, self.ctx)


class FastUpsample(nn.Module):
    """2x upsampling and its convolution without the enlarged map, where the size is exactly doubled."""

    def __init__(self, layer: Upsample, ctx: LayerContext) -> None:
        super().__init__()
        self.fused, self.conv = FastConv(layer.conv, ctx, upsample=True), FastConv(layer.conv, ctx)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.fused.normed(None, x)
        return self.conv.normed(None, F.interpolate(x, size=size, mode="nearest"))


class FastDownsample(nn.Module):
    """2x downsampling: directly, or by minimal filtering at all pixels, every second of which is kept."""

    def __init__(self, layer: Downsample, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(layer), ctx

    def forward(self, x: Tensor) -> Tensor:
        kernels, conv = self.ctx.kernels, self.source.layer.conv
        first = 1 if self.source.layer.conv.padding == (0, 0) else 0  # 1: padded below and right

        def direct() -> Tensor:
            padded = F.pad(x, (0, 1, 0, 1)) if first else x
            weight, bias = conv.weight.float(), floats(conv.bias)
            return by_picture(lambda p: F.conv2d(p, weight, bias, stride=2, padding=1 - first), padded, self.ctx)

        candidates: Candidates = {"direct": direct}
        if self.ctx.optimizations.fewer_products and kernels is not None and kernels.takes(conv.weight):
            scheme = _scheme(x, self.ctx)
            candidates["kernel"] = lambda: kernels.conv3x3(x, conv.weight, conv.bias, scheme, every=2, first=first)
        return self.ctx.autotuner.run(
            f"halved {first} {tuple(x.shape[1:])} {len(conv.weight)} {conv.weight.dtype}", candidates
        )


class FastTinyBlock(nn.Module):
    """A block of the tiny autoencoder, with ReLU and residual fused into its convolutions."""

    def __init__(self, block: TinyBlock, ctx: LayerContext) -> None:
        super().__init__()
        self.convs = [FastConv(conv, ctx) for conv in block.conv if isinstance(conv, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.convs
        h = second.normed(None, first.normed(None, x, relu=True), relu=True)
        return third.normed(None, h, residual=x, relu=True)


class FastResBlock(nn.Module):
    """A residual block with norms and additions fused into its convolutions."""

    def __init__(self, block: ResBlock, ctx: LayerContext) -> None:
        super().__init__()
        self.source, self.ctx = SourceLayer(block), ctx
        self.conv1, self.conv2 = FastConv(block.conv1, ctx), FastConv(block.conv2, ctx)
        self._times = VersionedCache[Tensor]()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        block = self.source.layer
        h = self.conv1.normed(block.norm1, x, added=None if emb is None else self._time(emb))
        residual = self._shortcut(x)
        return self.conv2.normed(block.norm2, h, residual=residual, inplace=residual is not x)

    def _time(self, emb: Tensor) -> Tensor | None:
        """The time embedding, which conv1's epilogue adds; cached, since models of one step need it once."""
        layer = self.source.layer.time_emb_proj
        if layer is None:
            return None
        weight, bias = layer.weight, layer.bias
        return self._times.get((weight, bias), lambda: fast_linear(F.silu(emb), weight, bias, self.ctx), emb)

    def _shortcut(self, x: Tensor) -> Tensor:
        conv = self.source.layer.conv_shortcut
        return x if conv is None else _pixelwise(x, conv, self.ctx)


def _pixelwise(x: Tensor, conv: nn.Conv2d, ctx: LayerContext) -> Tensor:
    """A 1x1 convolution of x (B, C, H, W)."""
    candidates: Candidates = {
        "direct": lambda: by_picture(lambda p: F.conv2d(p, conv.weight.float(), floats(conv.bias)), x, ctx)
    }
    if ctx.optimizations.onednn:
        rows, weight = x.permute(0, 2, 3, 1), conv.weight.flatten(1)
        candidates["linear"] = lambda: fast_linear(rows, weight, conv.bias, ctx).permute(0, 3, 1, 2)
    return ctx.autotuner.run(f"pixelwise {tuple(x.shape[1:])} {len(conv.weight)}", candidates)
