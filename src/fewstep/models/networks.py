"""The torch networks of one model, which only the torch engines and training see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from fewstep.locks import WeightsLock
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """UNet, autoencoder and text encoders in the order in which the UNet reads them.

    `tiny` decodes in the autoencoder's place. `lock`: held by engines that compute with the weights, and by whoever
    changes them.
    """

    unet: UNet
    autoencoder: AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    tiny: TinyAutoencoder | None = None
    lock: WeightsLock = field(default_factory=WeightsLock, repr=False, compare=False)

    def __iter__(self) -> Iterator[nn.Module]:
        """Every network."""
        yield from (self.unet, self.autoencoder, *self.text_encoders)
        if self.tiny is not None:
            yield self.tiny

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    def map(self, function: Callable[[Any], Any]) -> Networks:
        """`function` of every network, which gives one of the same kind; under the same lock."""
        return replace(
            self,
            unet=function(self.unet),
            autoencoder=function(self.autoencoder),
            text_encoders=tuple(map(function, self.text_encoders)),
            tiny=None if self.tiny is None else function(self.tiny),
        )
