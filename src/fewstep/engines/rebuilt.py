"""A network whose layers are replaced by an engine's own, without a copy of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

from fewstep.weights.parts import Parts

Network = TypeVar("Network", bound=nn.Module)
Parameters = dict[str, nn.Parameter | None]


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """What an engine puts in the places of layers.

    `layers` by the type of the layer, None leaving it; `doubled` for a convolution behind a doubling of the map;
    `parameters` is how the layers that stay see theirs.
    """

    layers: Mapping[type[nn.Module], Callable[[Any], nn.Module | None]]
    doubled: Callable[[nn.Conv2d], nn.Module]
    parameters: Callable[[Parameters], Any] = lambda own: own


def is_known(network: nn.Module) -> bool:
    """Whether a network has no layers but PyTorch's and fewstep's own: others, such as a LoRA that is being trained
    beside a layer, compute what an engine's layers do not know of.
    """
    ours = ("torch.nn.modules.", "fewstep.nn.", "fewstep.models.")
    return all(type(module).__module__.startswith(ours) for module in network.modules())


def rebuilt(network: Network, swaps: Swaps) -> Network:
    """A copy of `network` that shares its parameters, with the engine's layers in the places of those it knows."""
    return _copied(network, swaps)  # type: ignore[return-value]  # the outermost is never swapped


def rebuilt_parts(parts: Parts, swaps: Swaps) -> Parts:
    """The same for all networks of a model."""
    return replace(
        parts,
        unet=rebuilt(parts.unet, swaps),
        autoencoder=rebuilt(parts.autoencoder, swaps),
        text_encoders=tuple(rebuilt(tower, swaps) for tower in parts.text_encoders),
        tiny=None if parts.tiny is None else rebuilt(parts.tiny, swaps),
    )


def _copied(module: nn.Module, swaps: Swaps) -> nn.Module:
    swap = swaps.layers.get(type(module))
    if swap is not None and (found := swap(module)) is not None:
        return found
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*_copied_row(list(module), swaps))
    copied = copy.copy(module)  # its parameters stay the original's: new ones are seen here too
    copied.__dict__["_parameters"] = swaps.parameters(module._parameters)
    copied._modules = {name: child and _copied(child, swaps) for name, child in module._modules.items()}
    return copied


def _copied_row(layers: list[nn.Module], swaps: Swaps) -> Iterator[nn.Module]:
    """Layers one after the other, a doubling and the convolution behind it as one."""
    for before, layer in pairwise([nn.Identity(), *layers]):
        if isinstance(layer, nn.Upsample):
            yield nn.Identity()
        elif isinstance(before, nn.Upsample) and isinstance(layer, nn.Conv2d):
            yield swaps.doubled(layer)
        else:
            yield _copied(layer, swaps)
