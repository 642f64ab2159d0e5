"""The plain engine: PyTorch modules, called one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fewstep.engines.engine import Conditioning
from fewstep.models.networks import Networks
from fewstep.weights.model import ModelSpec

P = ParamSpec("P")
T = TypeVar("T")


def steady(call: Callable[Concatenate[EagerEngine, P], T]) -> Callable[Concatenate[EagerEngine, P], T]:
    """A call of an engine during which nobody changes the weights."""

    @wraps(call)
    def held(engine: EagerEngine, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with engine.networks.lock.computing():
            return call(engine, *args, **kwargs)

    return held


class EagerEngine:
    """Runs the networks where they are and in the number format they are in."""

    def __init__(self, spec: ModelSpec, networks: Networks) -> None:
        self.spec, self.networks = spec, networks
        self.device, self.dtype = networks.device, networks.dtype

    @staticmethod
    def supports(spec: ModelSpec, networks: Networks) -> bool:
        """Every model, wherever it is."""
        return True

    @steady
    def encode_text(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `Engine`. SD 1 and 2 read the last states, SDXL the penultimate ones of both towers side by side."""
        chunks = ids[0].shape[1]
        rows = [each.flatten(0, 1).to(self.device) for each in ids]
        states = [tower(tower_rows) for tower, tower_rows in zip(self.networks.text_encoders, rows, strict=True)]
        if self.spec.unet.addition is None:
            return _joined(states[0].last, chunks), None
        context = torch.cat([state.penultimate for state in states], dim=-1)
        return _joined(context, chunks), states[-1].pooled[::chunks].float()  # pooled: that of the first chunk

    @steady
    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Engine`."""
        if conditioning.channels is not None:
            x = torch.cat([x, conditioning.channels.to(x)], dim=1)
        pooled, sizes = conditioning.pooled, conditioning.sizes
        output = self.networks.unet(
            x.to(self.device, self.dtype),
            t.to(self.device),
            conditioning.context.to(self.device, self.dtype),
            None if pooled is None else pooled.to(self.device, self.dtype),
            None if sizes is None else sizes.to(self.device),
        )
        float32: Tensor = output.float()
        return float32

    @steady
    def decode(self, latents: Tensor) -> Tensor:
        """See `Engine`. A half-precision decoder that overflows is run again in float32."""
        if self.networks.tiny is not None:
            quick: Tensor = self.networks.tiny.decode(latents.to(self.device, self.dtype)).float()
            return quick
        vae, config = self.networks.autoencoder, self.spec.autoencoder
        latents = latents.to(self.device) / config.scaling_factor
        fragile = self.dtype == torch.float16 and config.force_upcast
        if not fragile:
            image: Tensor = vae.decode(latents.to(self.dtype)).float()
            if self.dtype == torch.float32 or bool(image.isfinite().all()):
                return image
        return self._in_float32(latents, "decode")

    @steady
    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine`. Like `decode`, again in float32 where half precision overflows."""
        vae, scale = self.networks.autoencoder, self.spec.autoencoder.scaling_factor
        moments: Tensor = vae.encode(image.to(self.device, self.dtype)).float()
        if self.dtype != torch.float32 and not bool(moments.isfinite().all()):
            moments = self._in_float32(image.to(self.device), "encode")
        mean, logvar = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * logvar.clamp(-30, 20))
        return mean * scale, deviation * scale

    def _in_float32(self, value: Tensor, method: str) -> Tensor:
        vae = copy.deepcopy(
            self.networks.autoencoder
        ).float()  # a copy: other threads compute with the weights as they are
        out: Tensor = getattr(vae, method)(value.float())
        return out


def _joined(states: Tensor, chunks: int) -> Tensor:
    """The windows (B * chunks, N, D) of each prompt end to end: (B, chunks * N, D) float32."""
    return states.reshape(len(states) // chunks, -1, states.shape[-1]).float()
