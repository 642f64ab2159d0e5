"""Replaces layers of a network by an engine's own, without copying weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

from torch import nn

from fewstep.models.networks import Network, Networks

Parameters = dict[str, nn.Parameter | None]


Layer = TypeVar("Layer", bound=nn.Module)


class SourceLayer(Generic[Layer]):
    """The layer that an engine's own one stands for, and whose parameters it reads.

    It keeps the layer out of the module tree: its parameters belong to the caller's network alone, and are not listed,
    moved or saved a second time.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Maps layers to an engine's replacements for them.

    `layers`: by type of the layer, a function that makes the replacement, or returns None to keep the layer.
    `upsample_conv` replaces nn.Upsample followed by a convolution. `parameters` wraps those of layers that are kept.
    """

    layers: Mapping[type[nn.Module], Callable[[Any], nn.Module | None]]
    upsample_conv: Callable[[nn.Conv2d], nn.Module]
    parameters: Callable[[Parameters], Any] = lambda own: own


def is_known(network: nn.Module) -> bool:
    """Whether a network has no layers but PyTorch's and fewstep's own: others, such as a LoRA that is being trained
    beside a layer, compute what an engine's layers do not know of.
    """
    ours = ("torch.nn.modules.", "fewstep.nn.", "fewstep.models.")
    return all(type(module).__module__.startswith(ours) for module in network.modules())


def replace_layers(network: Network, layer_map: LayerMap) -> Network:
    """A copy of `network` that shares its parameters, with the layers in `layer_map` replaced."""
    return _replaced(network, layer_map)  # type: ignore[return-value]  # the outermost is never replaced


def replace_model_layers(networks: Networks, layer_map: LayerMap) -> Networks:
    """`replace_layers` for all networks of a model."""
    return networks.map(lambda network: replace_layers(network, layer_map))


def _replaced(module: nn.Module, layer_map: LayerMap) -> nn.Module:
    replacement = layer_map.layers.get(type(module))
    if replacement is not None and (found := replacement(module)) is not None:
        return found
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*_replaced_sequence(list(module), layer_map))
    copied = copy.copy(module)  # its parameters stay the original's: new ones are seen here too
    copied.__dict__["_parameters"] = layer_map.parameters(module._parameters)
    copied._modules = {name: child and _replaced(child, layer_map) for name, child in module._modules.items()}
    return copied


def _replaced_sequence(layers: list[nn.Module], layer_map: LayerMap) -> Iterator[nn.Module]:
    """The layers of a Sequential, an upsampling and the convolution after it as one."""
    for before, layer in pairwise([nn.Identity(), *layers]):
        if isinstance(layer, nn.Upsample):
            yield nn.Identity()
        elif isinstance(before, nn.Upsample) and isinstance(layer, nn.Conv2d):
            yield layer_map.upsample_conv(layer)
        else:
            yield _replaced(layer, layer_map)
