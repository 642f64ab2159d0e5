"""The engine for NVIDIA cards: a model's networks in few kernels, each network one CUDA graph."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cache import PromptCache, WeightsWatch
from fewstep.engines.cuda.card import StreamOrder, is_on_one_card, on_card, operations
from fewstep.engines.cuda.clock import cuda_autotuner
from fewstep.engines.cuda.context import CudaLayerContext
from fewstep.engines.cuda.graphs import EagerCall, Graphs
from fewstep.engines.cuda.graphs import Function as GraphFunction
from fewstep.engines.cuda.layers import (
    CrossAttentionKV,
    CudaConv,
    CudaPixelAttention,
    CudaResBlock,
    CudaTextLayer,
    CudaTinyBlock,
    CudaTransformer,
    CudaTransformerBlock,
    CudaUpsample,
    FusedTimeProjections,
    UpsampleConv,
)
from fewstep.engines.cuda.memory import split_on_oom, tiled
from fewstep.engines.cuda.operations import PlainOperations
from fewstep.engines.cuda.optimizations import CudaOptimizations
from fewstep.engines.cuda.recording import Recordings, on_the_host
from fewstep.engines.eager import EagerEngine
from fewstep.engines.engine import Conditioning, Embedding, Function, NotRecordable
from fewstep.engines.replace_layers import LayerMap, is_known, replace_model_layers
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextLayer
from fewstep.models.tiny_autoencoder import TinyBlock
from fewstep.models.unet import UNet
from fewstep.nn.attention import PixelAttention
from fewstep.nn.convolution import Upsample
from fewstep.nn.resblock import ResBlock
from fewstep.nn.transformer import SpatialTransformer
from fewstep.weights.model import ModelSpec

_log = logging.getLogger(__name__)


class CudaEngine:
    """Runs a model on a card: text encoders, UNet and autoencoder each as one CUDA graph for each shape.

    What is merged into weights or taken out again counts at the next call, without a new capture; parameters that
    are put in the places of others need a new engine.
    It is also a `Recorder`: a run of few steps becomes one graph when its like is drawn a second time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        networks: Networks,
        *,
        optimizations: CudaOptimizations | None = None,
        graphs: Graphs | None = None,
        autotuner: Autotuner | None = None,
    ) -> None:
        self.spec, self.networks = spec, networks
        self.device, self.dtype = networks.device, networks.dtype
        optimizations, chosen = optimizations or CudaOptimizations(), autotuner or cuda_autotuner(self.device)
        found = operations(self.device, chosen) if optimizations.kernels else PlainOperations()
        self._ctx = CudaLayerContext(operations=found, autotuner=chosen, optimizations=optimizations)
        self._lock = threading.RLock()  # a graph has one set of inputs: one call at a time
        self._graphs = Graphs(None if optimizations.graphs else EagerCall) if graphs is None else graphs
        vae = overflow_safe_vae(networks.autoencoder, spec.autoencoder)
        self._fast = replace_model_layers(replace(networks, autoencoder=vae), layer_map(self._ctx))
        self._vae_dtype = next(vae.parameters()).dtype
        self._text_kv = _fuse_projections(self._fast.unet, self._ctx)
        self._plain, self._prompts = EagerEngine(spec, self._fast), PromptCache()
        self._texts: list[tuple[Tensor, Tensor]] = []
        self._watch = WeightsWatch(weight for network in networks for weight in network.parameters())
        self._recordings, self._order = Recordings(refused=not optimizations.graphs), StreamOrder()

    @staticmethod
    def supports(spec: ModelSpec, networks: Networks) -> bool:
        """Networks of known layers, all on one card that is new enough."""
        return is_on_one_card(networks) and all(map(is_known, networks))

    def encode_text(self, ids: Sequence[Tensor]) -> Embedding:
        """See `Engine`. The embeddings of the last prompts are cached until a tower's weight changes."""

        def make() -> Embedding:
            context, pooled = self._run("text", lambda *rows: self._plain.encode_text(rows), *ids)
            assert context is not None
            return context, pooled

        with self._ready():
            if self._recordings.running:
                return self._plain.encode_text(ids)
            return self._prompts.get(ids, (), make)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Engine`."""
        with self._ready():
            text_kv = self._text_kv_of(conditioning.context)
            rows = x, t, text_kv, conditioning.pooled, conditioning.sizes, conditioning.channels
            if self._recordings.running:
                return self._predict(*rows)
            return split_on_oom(self._predict, rows, forget=self._forget)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Engine`. What overflows half precision is decoded again in float32, and a debug message says so."""
        with self._ready():
            if self._recordings.running:
                return self._decode(latents)
            image = split_on_oom(self._decode, (latents,), forget=self._forget, last=partial(tiled, self._decode))
        if self.dtype == torch.float32 or bool(image.isfinite().all()):
            return image
        _log.debug("the decoder overflowed in %s: once more in float32", self._vae_dtype)
        return self._in_float32("decode", latents / self.spec.autoencoder.scaling_factor)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine`. Like `decode`, again in float32 where half precision overflows."""
        vae, scale = self._fast.autoencoder, self.spec.autoencoder.scaling_factor
        with self._ready():
            moments = self._run_one(
                "encode", lambda rows: (vae.encode(self._channels_last(rows, self._vae_dtype)),), image
            ).float()
        if self.dtype != torch.float32 and not bool(moments.isfinite().all()):
            moments = self._in_float32("encode", image)
        mean, logvar = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * logvar.clamp(-30, 20))
        return mean * scale, deviation * scale

    def record(
        self, key: Hashable, function: Function, given: Sequence[Tensor | None]
    ) -> Callable[[], Sequence[Tensor]] | None:
        """See `Recorder`. What cannot be recorded is tried once, and a debug message says why."""
        with self._ready():
            if not self._recordings.wants(key):
                return None
            try:
                with torch.inference_mode(False), torch.no_grad():
                    outputs = self._graphs.run(("whole", key), self._recordings.marked(function), *given)
            except (NotRecordable, RuntimeError) as error:  # torch.OutOfMemoryError too
                _log.debug("a run is not recorded as one graph: %s", error)
                self._recordings.refuse(key)
                return None
            return on_the_host([out for out in outputs if out is not None])

    def _text_kv_of(self, context: Tensor) -> Tensor:
        """Keys and values of a text for all cross attentions; cached for the last four texts."""
        for known, text_kv in self._texts:
            if known is context:
                return text_kv
        text_kv = self._run_one("text_kv", lambda rows: (self._text_kv(rows.to(self.dtype)),), context)
        self._texts = [*self._texts[-3:], (context, text_kv)]
        return text_kv

    def _predict(self, *rows: Tensor | None) -> Tensor:
        def function(x: Tensor, times: Tensor, text_kv: Tensor, *more: Tensor | None) -> tuple[Tensor]:
            pooled, sizes, channels = more
            x = x if channels is None else torch.cat([x, channels.to(x)], dim=1)
            pooled = None if pooled is None else pooled.to(self.dtype)
            return (self._fast.unet(self._channels_last(x, self.dtype), times, text_kv, pooled, sizes),)

        return self._run_one("unet", function, *rows).float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae, tiny, scale = self._fast.autoencoder, self._fast.tiny, self.spec.autoencoder.scaling_factor

        def function(rows: Tensor) -> tuple[Tensor]:
            if tiny is not None:
                return (tiny.decode(self._channels_last(rows, self.dtype)),)
            return (vae.decode(self._channels_last(rows / scale, self._vae_dtype)),)

        return self._run_one("decode", function, latents).float()

    def _channels_last(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def _run_one(self, name: str, function: GraphFunction, *given: Tensor | None) -> Tensor:
        (out,) = self._run(name, function, *given)
        assert out is not None
        return out

    def _run(self, name: Hashable, function: GraphFunction, *given: Tensor | None) -> Sequence[Tensor | None]:
        """Copies of what `function` makes of `given`, by a graph; within a recording just what it makes."""
        if self._recordings.running:
            return function(*given)
        with torch.inference_mode(False), torch.no_grad():  # what a graph reads and writes serves all modes
            here = [None if each is None else each.to(self.device, non_blocking=True) for each in given]
            return [None if out is None else out.clone() for out in self._graphs.run(name, function, *here)]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """One call at a time, with packed weights up to date."""
        with self.networks.lock.computing(), self._lock, on_card(self.device):
            if not self._recordings.running:
                self._order.follow(self.device)
                self._refresh()
            yield

    def _refresh(self) -> None:
        """Repack weights that have changed; drop all graphs if a weight has moved, since graphs hold its address."""
        changed, moved = self._watch.look()
        if moved:
            self._graphs.clear()
        if changed or moved:
            self._ctx.refresh()
            self._texts, self._prompts = [], PromptCache()

    def _forget(self) -> None:
        """Give back the memory of all graphs."""
        self._graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _in_float32(self, method: str, value: Tensor) -> Tensor:
        with torch.no_grad(), self.networks.lock.computing():
            vae = copy.deepcopy(self.networks.autoencoder).float()
            out: Tensor = getattr(vae, method)(value.to(self.device, torch.float32))
        return out


def layer_map(ctx: CudaLayerContext) -> LayerMap:
    """Which layers are replaced by which fast ones."""
    return LayerMap(
        layers={
            **{kind: partial(layer, ctx=ctx) for kind, layer in _LAYERS.items()},
        },
        upsample_conv=partial(UpsampleConv, ctx=ctx),
    )


_LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    PixelAttention: CudaPixelAttention,
    ResBlock: CudaResBlock,
    SpatialTransformer: CudaTransformer,
    TextLayer: CudaTextLayer,
    TinyBlock: CudaTinyBlock,
    Upsample: CudaUpsample,
    nn.Conv2d: CudaConv,
}


def _fuse_projections(unet: UNet, ctx: CudaLayerContext) -> CrossAttentionKV:
    """Fuse the time projections of all residual blocks, and the keys and values of all cross attentions."""
    blocks = [each for each in unet.modules() if isinstance(each, CudaResBlock)]
    unet.embedding = FusedTimeProjections(unet, blocks, ctx)  # type: ignore[method-assign]
    return CrossAttentionKV([each.attn2 for each in unet.modules() if isinstance(each, CudaTransformerBlock)], ctx)


def overflow_safe_vae(vae: AutoencoderKL, config: AutoencoderConfig) -> AutoencoderKL:
    """The autoencoder, or a copy in bfloat16, which has the range of float32, if it overflows float16."""
    fragile = config.force_upcast and next(vae.parameters()).dtype == torch.float16
    return copy.deepcopy(vae).to(torch.bfloat16) if fragile else vae
