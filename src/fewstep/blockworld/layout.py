"""Where the objects of a scene stand: the relation is plain to see, nothing is hidden or cut off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.blockworld.scene import ALONE, HALF_WIDTHS, HEIGHTS, RADII, SEATS, Scenes

ELEVATION = math.radians(28.0)
"""How far the orthographic camera looks down."""
SIN, COS = math.sin(ELEVATION), math.cos(ELEVATION)

BESIDE_GAP = (0.05, 0.22)
FRONT_ASIDE = (0.50, 0.70)
FRONT_DEPTH = (0.75, 1.00)
"""Beside: the free gap. In front of: the shifts to the side and in depth, in summed half widths."""


@dataclass(frozen=True, kw_only=True)
class Bodies:
    """The two objects of each scene, measured: half width, height and seat (B, 2)."""

    half: Tensor
    height: Tensor
    seat: Tensor
    generator: torch.Generator

    def uniform(self, low: float, high: float) -> Tensor:
        """(B,) drawn between `low` and `high`."""
        return torch.rand(len(self.half), generator=self.generator) * (high - low) + low


def placed(rows: Tensor, generator: torch.Generator) -> Scenes:
    """Scenes from (B, 7) rows of size, colour, shape twice and relation: objects placed, looks drawn."""
    size, colour, shape = rows[:, [0, 3]], rows[:, [1, 4]], rows[:, [2, 5]]
    relation, batch = rows[:, 6], len(rows)
    return Scenes(
        count=torch.where(relation == ALONE, 1, 2),
        shape=shape,
        colour=colour,
        size=size,
        relation=relation,
        position=_positions(shape, size, relation, generator),
        rotation=torch.randint(8, (batch, 2), generator=generator),
        backdrop=torch.randint(3, (batch,), generator=generator),
        tone=torch.rand(batch, 3, generator=generator),
    )


def _positions(shape: Tensor, size: Tensor, relation: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 2, 3) as in `Scenes.position`."""
    scale = RADII[size]
    bodies = Bodies(
        half=HALF_WIDTHS[shape] * scale,
        height=HEIGHTS[shape] * scale,
        seat=SEATS[shape] * scale,
        generator=generator,
    )
    left = _beside(bodies)
    right = left * torch.tensor([-1.0, 1.0, 1.0])
    places = torch.stack([_alone(bodies), _stacked(bodies), left, right, _in_front(bodies)])
    position: Tensor = places[relation, torch.arange(len(relation))]
    position[relation == ALONE, 1] = 0
    return position


def _pair(*coordinates: Tensor) -> Tensor:
    """(B, 2, 3) from u, v, height of the first object, then of the second, each (B,)."""
    return torch.stack(coordinates, -1).view(-1, 2, 3)


def _alone(bodies: Bodies) -> Tensor:
    u, v, none = bodies.uniform(-0.4, 0.4), bodies.uniform(-0.65, -0.2), bodies.uniform(0, 0)
    return _pair(u, v, none, none, none, none)


def _stacked(bodies: Bodies) -> Tensor:
    """Object 0 rests on object 1; the pile is about in the middle of the picture."""
    u, none = bodies.uniform(-0.35, 0.35), bodies.uniform(0, 0)
    lift = bodies.seat[:, 1]
    middle = (lift + bodies.height[:, 0]) * COS / 2
    v = (bodies.uniform(-0.12, 0.08) - middle).clamp(min=-0.74)
    return _pair(u, v, lift, u, v, none)


def _beside(bodies: Bodies) -> Tensor:
    """Object 0 stands left of object 1, with free ground between them."""
    first, second = bodies.half.unbind(1)
    width = 2 * (first + second) + bodies.uniform(*BESIDE_GAP)
    width = width.clamp(max=1.96)  # two large pyramids fill the picture
    start = bodies.uniform(-1, 1) * (0.98 - width / 2).clamp(max=0.2) - width / 2
    v, none = bodies.uniform(-0.55, -0.25), bodies.uniform(0, 0)
    return _pair(start + first, v, none, start + width - second, v + bodies.uniform(-0.05, 0.05), none)


def _in_front(bodies: Bodies) -> Tensor:
    """Object 0 stands nearer and to one side, so that it covers a part of object 1."""
    reach = bodies.half.sum(1)
    side = torch.where(bodies.uniform(-1, 1) < 0, -1.0, 1.0)
    aside = side * bodies.uniform(*FRONT_ASIDE) * reach / 2
    middle, v, none = bodies.uniform(-0.15, 0.15), bodies.uniform(-0.72, -0.55), bodies.uniform(0, 0)
    depth = bodies.uniform(*FRONT_DEPTH) * reach * SIN
    return _pair(middle - aside, v, none, middle + aside, v + depth, none)
