"""What a scene is made of: the attributes, their measures, and `Scenes`, a batch of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SHAPES: tuple[str, ...] = ("cube", "sphere", "cylinder", "cone", "pyramid", "torus")
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("alone", "on top of", "left of", "right of", "in front of")
"""How object 0 stands to object 1; `alone` is the relation of a scene with one object."""

ALONE, ON_TOP, LEFT, RIGHT, IN_FRONT = range(5)

RGB = torch.tensor(
    [
        [0.90, 0.08, 0.11],
        [1.00, 0.48, 0.03],
        [0.98, 0.90, 0.08],
        [0.10, 0.70, 0.20],
        [0.08, 0.80, 0.86],
        [0.10, 0.24, 0.94],
        [0.54, 0.14, 0.82],
        [1.00, 0.42, 0.73],
    ]
)
"""(8, 3) in [0, 1]: hues 358, 28, 55, 130, 185, 230, 275 and 328 degrees, as even as the names allow."""

RADII = torch.tensor([0.33, 0.44])
"""Scale of a solid per size; the picture is 2 wide and 2 high."""

HEIGHTS = torch.tensor([1.44, 2.0, 1.9, 2.1, 1.2, 1.98])
"""Height of each solid at scale 1."""

HALF_WIDTHS = torch.tensor([1.0, 1.0, 0.74, 0.85, 1.13, 0.97])
"""Largest half width of each solid at scale 1, over all its rotations."""

SEATS = torch.tensor([1.44, 1.94, 1.9, 1.92, 1.02, 1.92])
"""Height at scale 1 at which something rests on each solid; round and pointed ones are sunk into a little."""


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of B laid-out scenes; where `count` is 1 the second column is 0 and means nothing.

    count (B,) 1 or 2; shape, colour, size (B, 2) and relation (B,) index `SHAPES`, `COLOURS`, `SIZES` and
    `RELATIONS`; position (B, 2, 3) is (u, v, height): the ground point under the object on the picture in
    [-1, 1], v upwards, and how high above it the object stands; rotation (B, 2) in [0, 8) picks a pose;
    backdrop (B,) in [0, 3) and tone (B, 3) in [0, 1) choose the wall, the floor and their tint.
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    relation: Tensor
    position: Tensor
    rotation: Tensor
    backdrop: Tensor
    tone: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        """The scenes chosen by a slice, a tensor of indices or a boolean mask."""
        return Scenes(**{name: value[index] for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name; `Scenes(**tensors)` takes them back, from another device too."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
