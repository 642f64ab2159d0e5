"""Filling networks with the tensors of files: everything is compared first, then everything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fewstep.errors import CheckpointError
from fewstep.weights.files import TensorFile
from fewstep.weights.layouts import Place

SHOWN = 3  # of each kind of problem


@dataclass(frozen=True, kw_only=True)
class Filling:
    """One network on the meta device, the file that has its parameters, and where they lie in it."""

    name: str
    module: nn.Module
    file: TensorFile
    places: Mapping[str, Place]


def fill(
    fillings: Sequence[Filling],
    *,
    ignored: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every parameter its tensor, in `dtype` on `device`, and set the networks to evaluation without gradients.

    Tensors that are in `dtype` already stay mapped to their file. One CheckpointError names all that is missing,
    unexpected (but for the `ignored` names), of another shape or not of floating point; then nothing was read.
    """
    problems = [line for filling in fillings for line in _problems(filling)] + _unexpected(fillings, ignored)
    if problems:
        raise CheckpointError("these weights do not fit; nothing was loaded.\n  " + "\n  ".join(problems))
    for filling in fillings:
        _read(filling, dtype, device)


def _read(filling: Filling, dtype: torch.dtype, device: torch.device) -> None:
    file, state = filling.file, {}
    for name, parameter in filling.module.state_dict().items():
        place = filling.places[name]
        stored = file.read(place.key, file.dtypes[place.key] == dtype)
        state[name] = place.take(stored, tuple(parameter.shape)).to(device, dtype)
    filling.module.load_state_dict(state, assign=True)
    filling.module.requires_grad_(False).eval()


def _problems(filling: Filling) -> list[str]:
    missing, misshapen, integers = [], [], []
    shapes, dtypes = filling.file.shapes, filling.file.dtypes
    for name, parameter in filling.module.state_dict().items():
        place = filling.places[name]
        if place.key not in shapes:
            missing.append(place.key)
        elif shapes[place.key] not in (wanted := place.stored(tuple(parameter.shape))):
            misshapen.append(f"{place.key}: file {shapes[place.key]}, model {wanted[0]}")
        elif not dtypes[place.key].is_floating_point:
            integers.append(f"{place.key}: {dtypes[place.key]}")
    found = {"missing": missing, "of another shape": misshapen, "not of floating point": integers}
    return [_line(filling.name, filling.file, what, names) for what, names in found.items() if names]


def _unexpected(fillings: Sequence[Filling], ignored: Callable[[str], bool]) -> list[str]:
    """A line for each file with names that no network wants."""
    files = {id(filling.file): filling.file for filling in fillings}
    lines = []
    for key, file in files.items():
        sharing = [filling for filling in fillings if id(filling.file) == key]
        wanted = {place.key for filling in sharing for place in filling.places.values()}
        extra = [name for name in file.shapes if name not in wanted and not ignored(name)]
        if extra:
            lines.append(_line("+".join(filling.name for filling in sharing), file, "unexpected", extra))
    return lines


def _line(name: str, file: TensorFile, what: str, names: Iterable[str]) -> str:
    listed = sorted(set(names))
    more = f", ... {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{name} ({file.path}): {len(listed)} {what}: {', '.join(listed[:SHOWN])}{more}"
