"""From configs, which are untrusted input, to networks on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fewstep.errors import CheckpointError
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.weights.folder import read_json

MOST_LAYERS = 1000  # residual blocks and transformer layers; SDXL's UNet has 30 on its way down

Config = TypeVar("Config", UNetConfig, AutoencoderConfig, TextConfig)
Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")


def parsed(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of the JSON object in `path`; CheckpointError if it makes nothing of it."""
    config = read_json(path)
    try:
        return parse(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks a setting or has one of another kind: {error!r}") from error


def built(network: Callable[[Config], Network], config: Config, source: Path) -> Network:
    """The network on the meta device; CheckpointError when none, or an absurdly large one, has that shape."""
    try:
        layers = _layers(config)
        if layers > MOST_LAYERS:
            raise CheckpointError(f"{source} describes {layers} layers; expected at most {MOST_LAYERS}")
        with torch.device("meta"):
            return network(config)
    except (RuntimeError, ArithmeticError, TypeError, LookupError) as error:
        raise CheckpointError(f"{source} describes a network that cannot be built: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{source}: {error}") from error


def _layers(config: UNetConfig | AutoencoderConfig | TextConfig) -> int:
    if isinstance(config, TextConfig):
        return config.layers
    if isinstance(config, AutoencoderConfig):
        return len(config.channels) * config.resnets
    return config.mid_depth + sum(stage.resnets * (1 + stage.depth) for stage in config.stages)
