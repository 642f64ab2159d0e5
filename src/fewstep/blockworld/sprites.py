"""The sprite bank: every solid, seen by an orthographic camera, traced once per picture size.

An orthographic view does not change with the place of a solid, so one sprite of normals, depth and coverage
for each shape and rotation is all that a picture needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.blockworld.layout import COS, SIN
from fewstep.blockworld.scene import SHAPES

EXTENT = 1.35
"""A sprite shows u in [-EXTENT, EXTENT] and v in [CENTRE - EXTENT, CENTRE + EXTENT], at scale 1."""
CENTRE = 0.75
ROTATIONS = 8
SUPERSAMPLING = 3
CAMERA_DISTANCE = 4.0
VIEW = torch.tensor([0.0, COS, -SIN])
UP = torch.tensor([0.0, SIN, COS])

Distance = Callable[[Tensor], Tensor]


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(-1).sqrt()


def _box(excess: Tensor) -> Tensor:
    """Distance to a box from how far a point is past each face, last dimension."""
    return _length(excess.clamp(min=0)) + excess.amax(-1).clamp(max=0)


def _cube(p: Tensor) -> Tensor:
    return _box((p - torch.tensor([0, 0, 0.72])).abs() - 0.67) - 0.05


def _sphere(p: Tensor) -> Tensor:
    return _length(p - torch.tensor([0.0, 0.0, 1.0])) - 1


def _cylinder(p: Tensor) -> Tensor:
    around, along = _length(p[..., :2]) - 0.70, (p[..., 2] - 0.95).abs() - 0.91
    return _box(torch.stack([around, along], -1)) - 0.04


def _cone(p: Tensor) -> Tensor:
    slope = (_length(p[..., :2]) * 2.1 + (p[..., 2] - 2.1) * 0.85) / math.hypot(2.1, 0.85)
    return torch.maximum(slope, -p[..., 2])


def _pyramid(p: Tensor) -> Tensor:
    slope = (p[..., :2].abs().amax(-1) * 1.2 + (p[..., 2] - 1.2) * 0.80) / math.hypot(1.2, 0.80)
    return torch.maximum(slope, -p[..., 2])


def _torus(p: Tensor) -> Tensor:
    ring = torch.hypot(p[..., 0], p[..., 2] - 0.99) - 0.73
    return torch.hypot(ring, p[..., 1]) - 0.26


SOLIDS: dict[str, Distance] = {
    "cube": _cube,
    "sphere": _sphere,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "torus": _torus,
}
"""Signed distances (..., 3) -> (...) at scale 1, standing on the ground z = 0."""


def _angles(shape: str) -> list[float]:
    """Rotations about the vertical, in radians: two faces are always seen, and the hole of a torus."""
    if shape in ("cube", "pyramid"):
        return [math.radians(18 + 54 * turn / (ROTATIONS - 1)) for turn in range(ROTATIONS)]
    if shape == "torus":
        return [math.radians(-30 + 60 * turn / (ROTATIONS - 1)) for turn in range(ROTATIONS)]
    return [0.0]


def sprite_index(shape: Tensor, rotation: Tensor) -> Tensor:
    """Where the sprite of a shape and rotation, both long, is in the bank."""
    first, counts = _places(shape.device)
    return first[shape] + rotation % counts[shape]


@lru_cache(maxsize=4)
def _places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each shape the place of its first sprite in the bank, and how many there are."""
    counts = [len(_angles(name)) for name in SHAPES]
    first = [sum(counts[:i]) for i in range(len(SHAPES))]
    return torch.tensor(first, device=device), torch.tensor(counts, device=device)


def sprite_poses() -> list[tuple[int, int]]:
    """(shape, rotation) of each sprite in the bank."""
    return [(shape, turn) for shape, name in enumerate(SHAPES) for turn in range(len(_angles(name)))]


@lru_cache(maxsize=4)
def sprite_bank(size: int) -> Tensor:
    """(27, 5, R, R) for pictures of `size` pixels: normal xyz and depth, times coverage; then coverage."""
    resolution = max(48, round(size * 0.72))
    return torch.stack([_traced(SOLIDS[name], angle, resolution) for name in SHAPES for angle in _angles(name)])


def _traced(distance: Distance, angle: float, resolution: int) -> Tensor:
    """(5, R, R): one sprite by sphere tracing (Hart 1996), supersampled."""
    grid = (torch.arange(resolution * SUPERSAMPLING) + 0.5) / (resolution * SUPERSAMPLING) * 2 - 1
    v, u = torch.meshgrid(CENTRE - EXTENT * grid, EXTENT * grid, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    right = torch.tensor([1.0, 0.0, 0.0])
    origin = (u[..., None] * right + v[..., None] * UP - CAMERA_DISTANCE * VIEW) @ turn
    ray = VIEW @ turn
    travelled = torch.zeros_like(u)
    for _ in range(60):
        travelled = travelled + 0.9 * distance(origin + travelled[..., None] * ray)
    point = origin + travelled[..., None] * ray
    hit = ((distance(point).abs() < 4e-3) & (travelled < 9)).float()[..., None]
    normal = _normals(distance, point) @ turn.T
    depth = travelled[..., None] - CAMERA_DISTANCE
    return F.avg_pool2d((torch.cat([normal, depth, torch.ones_like(hit)], -1) * hit).permute(2, 0, 1), SUPERSAMPLING)


def _normals(distance: Distance, point: Tensor, step: float = 1e-3) -> Tensor:
    """Unit normals (..., 3) from central differences."""
    axes = step * torch.eye(3)
    slopes = [distance(point + axis) - distance(point - axis) for axis in axes]
    return F.normalize(torch.stack(slopes, -1), dim=-1)
