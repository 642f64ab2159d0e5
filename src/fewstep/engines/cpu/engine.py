"""The engine itself: a model's networks with fast layers in the places of the plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewstep.engines.cpu.choices import Choices, of_this_machine
from fewstep.engines.cpu.layers import (
    FEWEST_CHANNELS,
    FastAttention,
    FastConv,
    FastLinear,
    FastPixelAttention,
    FastResBlock,
    FastTransformer,
    FastUpsample,
    Means,
)
from fewstep.engines.cpu.winograd import STRICT, WINOGRAD
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Conditioning
from fewstep.nn.attention import Attention, PixelAttention
from fewstep.nn.convolution import Upsample
from fewstep.nn.resblock import ResBlock
from fewstep.nn.transformer import SpatialTransformer
from fewstep.weights.parts import Parts

BUDGET = 1 << 30
"""Bytes of transformed weights that are kept; those of other layers are made at each call."""

Network = TypeVar("Network", bound=nn.Module)


class CpuEngine:
    """Runs `parts`, in float32 on a CPU, with the same result up to rounding; `strict` keeps rounding smaller still.

    Weights are those of `parts` themselves: what is merged into them or taken out again counts at the next call.
    """

    def __init__(
        self, parts: Parts, *, strict: bool = False, budget: int = BUDGET, choices: Choices | None = None
    ) -> None:
        assert runs(parts), "the engine for CPUs computes in float32 on a CPU"
        means = Means(choices=choices or of_this_machine(), budget=budget, scheme=STRICT if strict else WINOGRAD)
        self.parts = parts
        tiny = None if parts.tiny is None else fast(parts.tiny, means)
        networks = replace(
            parts,
            unet=fast(parts.unet, means),
            autoencoder=fast(parts.autoencoder, means),
            text_encoders=tuple(fast(tower, means) for tower in parts.text_encoders),
            tiny=tiny,
        )
        self.plain = EagerEngine(networks)
        self.device, self.dtype = self.plain.device, self.plain.dtype

    def encode_text(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `Engine`."""
        with torch.no_grad():
            return self.plain.encode_text(ids)

    def predict(self, x: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """See `Engine`."""
        with torch.no_grad():
            return self.plain.predict(_pixels_first(x), t, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Engine`."""
        with torch.no_grad():
            return self.plain.decode(_pixels_first(latents))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        with torch.no_grad():
            return self.plain.encode(_pixels_first(image))


def runs(parts: Parts) -> bool:
    """Whether the engine for CPUs can run `parts`."""
    weight = parts.unet.conv_in.weight
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and available


def fast(network: Network, means: Means) -> Network:
    """A copy of `network` that shares its parameters, fast layers in the places of those that have some."""
    return _copied(network, means)  # type: ignore[return-value]  # the outermost is never swapped


def _copied(module: nn.Module, means: Means) -> nn.Module:
    if isinstance(module, SpatialTransformer):
        blocks = _copied(module.transformer_blocks, means)
        assert isinstance(blocks, nn.ModuleList)
        return FastTransformer(module, blocks, means)
    swap = _SWAPS.get(type(module))
    if swap is not None:
        return swap(module, means)
    if isinstance(module, nn.Conv2d) and _is_plain_3x3(module):
        return FastConv(module, means)
    copied = copy.copy(module)  # the dict of parameters stays the original's: new ones are seen here too
    copied._modules = {name: child and _copied(child, means) for name, child in module._modules.items()}
    return copied


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return shape == ((3, 3), (1, 1), (1, 1), 1) and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS


def _pixels_first(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_SWAPS: dict[type[nn.Module], Callable[[Any, Means], nn.Module]] = {
    nn.Linear: FastLinear,
    Attention: FastAttention,
    PixelAttention: FastPixelAttention,
    ResBlock: FastResBlock,
    Upsample: FastUpsample,
}
