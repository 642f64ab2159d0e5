"""From configs and files, which are untrusted, to networks: all is compared first, then all is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fewstep.errors import CheckpointError
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.weights.fetch import read_json
from fewstep.weights.files import TensorFile
from fewstep.weights.layouts import Place

MOST_LAYERS = 1000  # residual blocks and transformer layers; SDXL's UNet has 30 on its way down
SHOWN = 3  # names of each kind of problem

Config = TypeVar("Config", UNetConfig, AutoencoderConfig, TextConfig)
Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")


class Filling(NamedTuple):
    """One network on the meta device, the file that has its parameters, and where they lie in it."""

    network: nn.Module
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


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters as they are: filling them on the meta device would import torch's compiler, seconds long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def built(network: Callable[[Config], Network], config: Config, source: Path) -> Network:
    """The network on the meta device; CheckpointError when none, or an absurdly large one, has that shape."""
    try:
        if (layers := _layers(config)) <= MOST_LAYERS:
            with torch.device("meta"), _Unfilled():
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
    if problems := [line for filling in fillings for line in _misfits(filling)] + _unexpected(fillings, ignored):
        raise CheckpointError("these weights do not fit; nothing was loaded.\n  " + "\n  ".join(problems))
    for network, file, places in fillings:
        state = {}
        for name, parameter in network.state_dict().items():
            stored = file.read(places[name].key, file.dtypes[places[name].key] == dtype)
            state[name] = places[name].take(stored, tuple(parameter.shape)).to(device, dtype)
        network.load_state_dict(state, assign=True)
        network.requires_grad_(False).eval()


def _layers(config: UNetConfig | AutoencoderConfig | TextConfig) -> int:
    if isinstance(config, TextConfig):
        return config.layers
    if isinstance(config, AutoencoderConfig):
        return len(config.channels) * config.resnets
    return config.mid_depth + sum(stage.resnets * (1 + stage.depth) for stage in config.stages)


def _misfits(filling: Filling) -> list[str]:
    """A line for each kind of parameter that the file has not, or has differently."""
    missing, misshapen, integer = set[str](), set[str](), set[str]()
    network, file, places = filling
    for name, parameter in network.state_dict().items():
        key, wanted = places[name].key, places[name].stored(tuple(parameter.shape))
        if key not in file.shapes:
            missing.add(key)
        elif file.shapes[key] not in wanted:
            misshapen.add(f"{key}: file {file.shapes[key]}, model {wanted[0]}")
        elif not file.dtypes[key].is_floating_point:
            integer.add(f"{key}: {file.dtypes[key]}")
    kinds = {"missing": missing, "of another shape": misshapen, "not of floating point": integer}
    return [_line(file, what, names) for what, names in kinds.items() if names]


def _unexpected(fillings: Sequence[Filling], ignored: Callable[[str], bool]) -> list[str]:
    """A line for each file with names that no network wants."""
    wanted: dict[Path, set[str]] = {}
    for _, file, places in fillings:
        wanted.setdefault(file.path, set()).update(place.key for place in places.values())
    files = {file.path: file for _, file, _ in fillings}
    extra = {
        path: {key for key in file.shapes.keys() - wanted[path] if not ignored(key)} for path, file in files.items()
    }
    return [_line(files[path], "unexpected", names) for path, names in extra.items() if names]


def _line(file: TensorFile, what: str, names: set[str]) -> str:
    more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{file.path}: {len(names)} {what}: {', '.join(sorted(names)[:SHOWN])}{more}"
