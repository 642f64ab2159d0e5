"""LoRAs beside the weights, where they can be trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapters.lora import Factors, Layer, Lora, layers_of
from fewstep.errors import InputError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
TRANSFORMERS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "fc1", "fc2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")
"""Ends of the names of layers: the usual targets, more of the transformers, and what makes textures."""


class LowRank(nn.Module):
    """The trained part of a LoRA for one layer: x -> what is added to the layer's output.

    `name` is the layer's in a `Lora`. At first `up` is 0, and so is what is added. Always in float32.
    """

    def __init__(self, layer: Layer, name: str, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.name, self.alpha = name, alpha
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down: Layer
        self.up: Layer
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            size, stride, padding = layer.kernel_size, layer.stride, layer.padding
            self.down = nn.Conv2d(layer.in_channels, rank, size, stride, padding, bias=False)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.to(layer.weight.device, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.up(self.down(self.dropout(x.float())))
        return out

    def product(self) -> Tensor:
        """The change of the layer's weight, with gradients; see `Factors`."""
        return Factors(down=self.down.weight, up=self.up.weight, alpha=self.alpha).product()


class LoraLayer(nn.Module):
    """A frozen layer with a LoRA beside it; the function and, for who reads it, the `weight` of their sum."""

    def __init__(self, layer: Layer, update: LowRank) -> None:
        super().__init__()
        self.layer, self.update = layer, update

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        added: Tensor = self.update(x)
        return out + added.to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """The layer's weight with the LoRA's product added: what transformers read of their projections."""
        frozen = self.layer.weight
        return frozen + self.update.product().reshape(frozen.shape).to(frozen.dtype)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the layer: its bias, its padding."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def inject(
    networks: Mapping[str, nn.Module],
    *,
    rank: int,
    alpha: float | None = None,
    targets: Collection[str] = ATTENTION,
    dropout: float = 0.0,
) -> nn.ModuleList:
    """Put a fresh LoRA beside each target layer of `networks`, freeze all else, and return the `LowRank` modules.

    `networks` by the names `unet`, `text_encoder`, `text_encoder_2`: `{"unet": pipe.networks.unet}`, or all of
    `adapters.lora.networks(parts)`. `targets`: the ends of names. `alpha` defaults to the rank. The networks compute
    exactly what they did until a step of training is taken. InputError for values out of range or no target at all.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"rank {rank}, dropout {dropout:g}: the rank must be 1 or more, the dropout from 0 to below 1")
    ends = tuple(f".{target}" for target in targets)
    chosen = {name: layer for name, layer in layers_of(networks).items() if name.endswith(ends)}
    if not chosen:
        some = ", ".join(sorted(layers_of(networks))[:3])
        raise InputError(f"no layer ends with {', '.join(targets)}; there are {some}, ...")
    updates = nn.ModuleList()
    for name, layer in chosen.items():
        update = LowRank(layer, name, rank=rank, alpha=rank if alpha is None else alpha, dropout=dropout)
        _replace(networks, name, LoraLayer(layer, update))
        updates.append(update)
    for network in networks.values():
        network.requires_grad_(False)
        for module in network.modules():
            if isinstance(module, LowRank):
                module.requires_grad_(True)
    return updates


def eject(networks: Mapping[str, nn.Module]) -> None:
    """Take out all that was injected into `networks`."""
    for prefix, network in networks.items():
        adapted = [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
        for name, module in adapted:
            _replace(networks, f"{prefix}.{name}", module.layer)


def trained_lora(updates: Iterable[nn.Module], name: str = "lora") -> Lora:
    """The LoRA that the `LowRank` modules of `inject`, or a moving average of them, hold now."""
    layers = {}
    for update in updates:
        assert isinstance(update, LowRank), "inject makes no other"
        down, up = (layer.weight.detach().clone() for layer in (update.down, update.up))
        layers[update.name] = Factors(down=down, up=up, alpha=update.alpha)
    return Lora(name=name, layers=layers)


def _replace(networks: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    network, _, layer = name.partition(".")
    networks[network].set_submodule(layer, module)
