"""From configs and files, which are untrusted, to networks: all is compared first, then all is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fewstep.errors import CheckpointError
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.weights.files import TensorFile
from fewstep.weights.folder import read_json
from fewstep.weights.layouts import Place

MOST_LAYERS = 1000  # residual blocks and transformer layers; SDXL's UNet has 30 on its way down
SHOWN = 3  # names of each kind of problem

Config = TypeVar("Config", UNetConfig, AutoencoderConfig, TextConfig)
Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Filling:
    """One network on the meta device, the file that has its parameters, and where they lie in it."""

    name: str
    module: nn.Module
    file: TensorFile
    places: Mapping[str, Place]


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
        if (layers := _layers(config)) <= MOST_LAYERS:
            with torch.device("meta"):
                return network(config)
    except (RuntimeError, ArithmeticError, TypeError, LookupError, ValueError) as error:
        raise CheckpointError(f"{source} describes a network that cannot be built: {error}") from error
    raise CheckpointError(f"{source} describes {layers} layers; expected at most {MOST_LAYERS}")


def fill(
    fillings: Sequence[Filling], *, ignored: Callable[[str], bool], dtype: torch.dtype, device: torch.device
) -> None:
    """Give every parameter its tensor, in `dtype` on `device`, and set the networks to evaluation without gradients.

    Tensors that are in `dtype` already stay mapped to their file. One CheckpointError names all that is missing,
    unexpected (but for the `ignored` names), of another shape or not of floating point; then nothing was read.
    """
    problems = [line for filling in fillings for line in _problems(filling)] + _unexpected(fillings, ignored)
    if problems:
        raise CheckpointError("these weights do not fit; nothing was loaded.\n  " + "\n  ".join(problems))
    for filling in fillings:
        file, state = filling.file, {}
        for name, parameter in filling.module.state_dict().items():
            place = filling.places[name]
            stored = file.read(place.key, file.dtypes[place.key] == dtype)
            state[name] = place.take(stored, tuple(parameter.shape)).to(device, dtype)
        filling.module.load_state_dict(state, assign=True)
        filling.module.requires_grad_(False).eval()


def _layers(config: UNetConfig | AutoencoderConfig | TextConfig) -> int:
    if isinstance(config, TextConfig):
        return config.layers
    if isinstance(config, AutoencoderConfig):
        return len(config.channels) * config.resnets
    return config.mid_depth + sum(stage.resnets * (1 + stage.depth) for stage in config.stages)


def _problems(filling: Filling) -> list[str]:
    """A line for each kind of parameter that the file has not, or has differently."""
    found: dict[str, list[str]] = {"missing": [], "of another shape": [], "not of floating point": []}
    shapes, dtypes = filling.file.shapes, filling.file.dtypes
    for name, parameter in filling.module.state_dict().items():
        key, wanted = filling.places[name].key, filling.places[name].stored(tuple(parameter.shape))
        if key not in shapes:
            found["missing"].append(key)
        elif shapes[key] not in wanted:
            found["of another shape"].append(f"{key}: file {shapes[key]}, model {wanted[0]}")
        elif not dtypes[key].is_floating_point:
            found["not of floating point"].append(f"{key}: {dtypes[key]}")
    return [_line(filling.name, filling.file, what, names) for what, names in found.items() if names]


def _unexpected(fillings: Sequence[Filling], ignored: Callable[[str], bool]) -> list[str]:
    """A line for each file with names that no network wants."""
    sharing: dict[int, list[Filling]] = {}
    for filling in fillings:
        sharing.setdefault(id(filling.file), []).append(filling)
    lines = []
    for group in sharing.values():
        wanted = {place.key for filling in group for place in filling.places.values()}
        extra = [name for name in group[0].file.shapes if name not in wanted and not ignored(name)]
        if extra:
            lines.append(_line("+".join(filling.name for filling in group), group[0].file, "unexpected", extra))
    return lines


def _line(name: str, file: TensorFile, what: str, names: Iterable[str]) -> str:
    listed = sorted(set(names))
    more = f", ... {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{name} ({file.path}): {len(listed)} {what}: {', '.join(listed[:SHOWN])}{more}"
