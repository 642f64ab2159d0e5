"""The engine for CPUs: a model's networks with fast layers in the places of the plain ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.engines.autotune import Autotuner, cpu_autotuner
from fewstep.engines.cache import PromptCache
from fewstep.engines.cpu.attention import FastAttention, FastPixelAttention, FastTransformer
from fewstep.engines.cpu.build import kernels
from fewstep.engines.cpu.compiled import to_channels_last
from fewstep.engines.cpu.context import LayerContext
from fewstep.engines.cpu.convolution import (
    FastConv,
    FastDownsample,
    FastPointwise,
    FastResBlock,
    FastTinyBlock,
    FastUpsample,
)
from fewstep.engines.cpu.float32_parameters import FastEmbedding, Float32Parameters
from fewstep.engines.cpu.limits import cap_threads, memory_errors, threads_for
from fewstep.engines.cpu.linear import FastLinear
from fewstep.engines.cpu.optimizations import Optimizations
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Conditioning, Embedding
from fewstep.engines.replace_layers import LayerMap, is_known, replace_model_layers
from fewstep.models.networks import Networks
from fewstep.models.tiny_autoencoder import TinyBlock
from fewstep.nn.attention import Attention, PixelAttention
from fewstep.nn.convolution import Downsample, Upsample
from fewstep.nn.resblock import ResBlock
from fewstep.nn.transformer import SpatialTransformer
from fewstep.weights.model import ModelSpec

BUDGET = 1 << 30
"""Bytes of transformed weights that are kept without kernels; those of other layers are made at each call."""

STORED = (torch.float32, torch.float16)
"""Formats of weights that it computes with, in float32 always."""

_log = logging.getLogger(__name__)


class CpuEngine:
    """Runs a model on a CPU in float32, with the same result up to rounding; `strict` keeps rounding smaller still.

    The weights stay those of `networks`: what is merged into them or taken out again counts at the next call. They
    may be in float16, in half the memory: each is widened as it is read. If they are moved to another device or to a
    format that is neither, the plain engine takes over. `threads` run each call; see `threads_for`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        networks: Networks,
        *,
        strict: bool = False,
        optimizations: Optimizations | None = None,
        budget: int = BUDGET,
        autotuner: Autotuner | None = None,
    ) -> None:
        assert reads(networks), "the engine for CPUs reads weights in float32 or float16 on a CPU"
        self.threads = threads_for(sum(weight.numel() for weight in networks.unet.parameters()))
        onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        optimizations = replace(optimizations or Optimizations(), **({} if onednn else {"onednn": False}))
        built = kernels() if optimizations.kernels else None
        chosen = autotuner or cpu_autotuner(self.threads)
        ctx = LayerContext(autotuner=chosen, kernels=built, optimizations=optimizations, budget=budget, strict=strict)
        self.spec, self.networks = spec, networks
        self._fast = EagerEngine(spec, replace_model_layers(networks, layer_map(ctx)))
        self._fast.dtype = torch.float32  # of what goes through the networks
        self.device, self.dtype = self._fast.device, self._fast.dtype
        self._prompts = PromptCache()
        self._fallback_logged = False

    @staticmethod
    def supports(spec: ModelSpec, networks: Networks) -> bool:
        """Networks of known layers, on a CPU, in float32 or float16."""
        return reads(networks) and all(map(is_known, networks))

    def encode_text(self, ids: Sequence[Tensor]) -> Embedding:
        """See `Engine`. The embeddings of the last prompts are cached until a tower's weight changes."""
        weights = [weight for tower in self.networks.text_encoders for weight in tower.parameters()]
        with self._ready() as engine:
            return self._prompts.get(ids, weights, lambda: engine.encode_text(ids))

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Engine`."""
        with self._ready() as engine:
            return engine.predict(to_channels_last(x), t, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Engine`."""
        with self._ready() as engine:
            return engine.decode(to_channels_last(latents))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        with self._ready() as engine:
            return engine.encode(to_channels_last(image))

    @contextmanager
    def _ready(self) -> Iterator[EagerEngine]:
        """The fast engine, or the plain one for weights that it cannot compute with."""
        fits = reads(self.networks)
        if not fits and not self._fallback_logged:
            _log.debug("%s is no longer in float32 or float16 on a CPU: the plain engine runs it", self.spec.name)
            self._fallback_logged = True
        with torch.no_grad(), memory_errors(), cap_threads(self.threads):
            yield self._fast if fits else EagerEngine(self.spec, self.networks)


def reads(networks: Networks) -> bool:
    """Whether all networks are on a CPU and in a format that the engine reads."""
    weights = [next(network.parameters()) for network in networks]
    return all(each.device.type == "cpu" and each.dtype in STORED for each in weights)


def layer_map(ctx: LayerContext) -> LayerMap:
    """Which layers are replaced by which fast ones."""
    return LayerMap(
        layers={
            nn.Conv2d: partial(_fast_conv, ctx=ctx),
            nn.Embedding: FastEmbedding,
            **{kind: partial(layer, ctx=ctx) for kind, layer in _LAYERS.items()},
        },
        upsample_conv=partial(FastConv, ctx=ctx, upsample=True),
        parameters=Float32Parameters,
    )


def _fast_conv(conv: nn.Conv2d, ctx: LayerContext) -> nn.Module | None:
    if (conv.stride, conv.groups) == ((1, 1), 1):
        if (conv.kernel_size, conv.padding) == ((3, 3), (1, 1)):
            return FastConv(conv, ctx)
        if (conv.kernel_size, conv.padding) == ((1, 1), (0, 0)):
            return FastPointwise(conv, ctx)
    return None


_LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: FastLinear,
    Attention: FastAttention,
    Downsample: FastDownsample,
    PixelAttention: FastPixelAttention,
    ResBlock: FastResBlock,
    SpatialTransformer: FastTransformer,
    TinyBlock: FastTinyBlock,
    Upsample: FastUpsample,
}
