"""Weights of auxiliary networks (CLIP, DINOv2, the readers), and the name and digest that identify them in reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fewstep.errors import CheckpointError
from fewstep.files import atomic_write
from fewstep.models.dinov2 import Dinov2, Dinov2Config
from fewstep.weights.folder import parsed, weight_files
from fewstep.weights.load import open_part

ASSETS = Path(__file__).parents[1] / "assets" / "block-readers"
IGNORED_ENDINGS = ("position_ids", "logit_scale")
"""Endings of tensors that CLIP's folders hold beside the towers' weights."""
BLOCK = 2**22  # bytes
DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class NetworkId:
    """A network's identity: its name, and 16 hex digits of the SHA-256 of its weight files."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.digest})"


def load_network(folder: Path, *networks: nn.Module) -> NetworkId:
    """Give `networks` the weights in `folder`, in float32 and frozen; the identity, named like the folder.

    No two networks share a name, and all names of the files belong to one. Raises CheckpointError, and fills nothing,
    when names or shapes differ.
    """
    file = open_part(folder)
    expected = {name: value for network in networks for name, value in network.state_dict().items()}
    shapes = {name: shape for name, shape in file.shapes.items() if not name.endswith(IGNORED_ENDINGS)}
    _check(file.path, shapes, expected)
    for network in networks:
        network.load_state_dict({name: file.read(name, False).float() for name in network.state_dict()})
        network.requires_grad_(False).eval()
    return NetworkId(name=folder.name, digest=file_digest(weight_files(folder, half=False)))


def load_dinov2(folder: Path) -> Dinov2:
    """The network in a transformers folder, frozen, in float32; CheckpointError when a name or shape differs."""
    network = Dinov2(parsed(folder / "config.json", Dinov2Config.from_transformers))
    load_network(folder, network)
    return network


def save_network(network: nn.Module, folder: Path) -> None:
    """Write a folder that `load_network` reads: weights in half precision, and what they are weights of."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in network.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as file:
        file.write(save(weights, {"format": "pt"}))
    with atomic_write(folder / "config.json") as file:
        file.write(f'{{"_class_name": "{type(network).__name__}"}}\n'.encode())


def _check(path: Path, held: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    wrong = sorted(name for name, value in expected.items() if held.get(name) != tuple(value.shape))
    extra = sorted(held.keys() - expected.keys())
    if wrong or extra:
        first = f"{wrong[0]} is missing or of another shape" if wrong else f"{extra[0]} is not known"
        raise CheckpointError(
            f"{path} does not fit: {len(wrong)} tensors are missing or of another shape, {len(extra)} not known "
            f"({first}); nothing was loaded"
        )


def file_digest(paths: Iterable[Path]) -> str:
    """16 hex digits of the SHA-256 over the bytes of `paths`."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                total.update(block)
    return total.hexdigest()[:DIGITS]


def weights_digest(networks: Iterable[nn.Module]) -> str:
    """16 hex digits of the SHA-256 over the weights of loaded networks, as they are in memory."""
    total = hashlib.sha256()
    for network in networks:
        for name, value in network.state_dict().items():
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:DIGITS]
