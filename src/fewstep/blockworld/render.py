"""Pictures of scenes: a muted stage, soft shadows, then the two objects in order of depth."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.blockworld.layout import COS, SIN
from fewstep.blockworld.scene import RADII, RGB, Scenes
from fewstep.blockworld.sprites import CENTRE, EXTENT, VIEW, sprite_bank, sprite_index
from fewstep.errors import InputError

LIGHT = F.normalize(torch.tensor([-0.55, -0.62, 0.80]), dim=0)
HALFWAY = F.normalize(LIGHT - VIEW, dim=0)
CHUNK, CARD_CHUNK = 128, 1024
"""Scenes drawn at once: more only costs cache, or a card's memory."""
CPU = torch.device("cpu")


class RenderConstants(NamedTuple):
    """What pictures are drawn with, on one device: the radii of sizes, the colours, and two directions (3,)."""

    radii: Tensor
    rgb: Tensor
    light: Tensor
    halfway: Tensor


class RenderLayer(NamedTuple):
    """One object of each scene: colour (B, 3, S, S), coverage and depth (B, S, S)."""

    rgb: Tensor
    alpha: Tensor
    depth: Tensor


def render(scenes: Scenes, size: int) -> Tensor:
    """(B, 3, size, size) float32 in [-1, 1], where the scenes are; `size` is at least 16 pixels, else `InputError`."""
    if size < 16:
        raise InputError(f"size is {size}; a scene needs at least 16 pixels, and 64 to be read well")
    step = CHUNK if scenes.count.device == CPU else CARD_CHUNK
    chunks = [_drawn(scenes[i : i + step], size) for i in range(0, len(scenes), step)]
    return torch.cat(chunks) if chunks else torch.zeros(0, 3, size, size)


def _drawn(scenes: Scenes, size: int) -> Tensor:
    first, second = _layer(scenes, 0, size), _layer(scenes, 1, size)
    both = (first.alpha > 0.02) & (second.alpha > 0.02)
    nearer = torch.where(both, first.depth < second.depth, first.alpha >= second.alpha)[:, None]
    a, b = first.alpha[:, None], second.alpha[:, None]
    picture = _stage(scenes, size) * _shadows(scenes, size)[:, None]
    picture = torch.lerp(picture, torch.where(nearer, second.rgb, first.rgb), torch.where(nearer, b, a))
    picture = torch.lerp(picture, torch.where(nearer, first.rgb, second.rgb), torch.where(nearer, a, b))
    return picture.clamp(0, 1) * 2 - 1


@lru_cache(maxsize=8)
def screen(size: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """The pixels' centres in [-1, 1]: u to the right and v upwards, both (S, S)."""
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(-grid, grid, indexing="ij")
    return u.to(device), v.to(device)


@lru_cache(maxsize=4)
def _constants(device: torch.device) -> RenderConstants:
    return RenderConstants(*(value.to(device) for value in (RADII, RGB, LIGHT, HALFWAY)))


@lru_cache(maxsize=4)
def _bank(size: int, device: torch.device) -> Tensor:
    """The sprites on a device."""
    return sprite_bank(size).to(device)


def _stage(scenes: Scenes, size: int) -> Tensor:
    """(B, 3, S, S): a plain wash, a chequered floor, or a floor and a wall, nearly grey."""
    u, v = screen(size, scenes.tone.device)
    tone = 0.62 + 0.30 * scenes.tone[:, :1]
    warmth = scenes.tone[:, 1:2] - 0.5
    colour = tone * torch.cat([1 + 0.05 * warmth, torch.ones_like(warmth), 1 - 0.10 * warmth], 1)
    wall = torch.sigmoid((v - 0.42) * size / 2)
    squares = (torch.floor(u * 2.5 + 0.25) + torch.floor(v / SIN * 2.5)) % 2 * 0.08 - 0.04
    wash = 1 + 0.12 * v
    stages = torch.stack([wash, wash + squares * (1 - wall), (1 + 0.10 * v) * (1 - wall) + 0.84 * wall])
    vignette = 1 - 0.10 * (u * u + v * v)
    return colour[:, :, None, None] * (stages * vignette)[scenes.backdrop][:, None]


def _shadows(scenes: Scenes, size: int) -> Tensor:
    """(B, S, S) in [0.5, 1]: soft, away from the light, under what stands on the ground."""
    device = scenes.position.device
    u, v = screen(size, device)
    scale = _constants(device).radii[scenes.size][..., None, None]
    position = scenes.position[..., None, None]
    x = (u - position[:, :, 0] - 0.30 * scale) / (1.15 * scale)
    y = ((v - position[:, :, 1]) / SIN - 0.25 * scale) / (1.15 * scale)
    dark = 0.5 * torch.exp(-0.9 * (x * x + y * y) ** 1.5)
    grounded = (scenes.position[:, :, 2] == 0) & (torch.arange(2, device=device) < scenes.count[:, None])
    return (1 - dark * grounded[..., None, None]).prod(1)


def _layer(scenes: Scenes, which: int, size: int) -> RenderLayer:
    """Object `which`, absent where the scene has no such object."""
    constants = _constants(scenes.position.device)
    scale = constants.radii[scenes.size[:, which]][:, None, None]
    u0, v0, height = scenes.position[:, which, :, None, None].unbind(1)
    index = sprite_index(scenes.shape[:, which], scenes.rotation[:, which])
    sprite = sampled(_bank(size, index.device)[index], u0, v0 + height * COS, scale, size)
    coverage = sprite[:, 4]
    whole = sprite / coverage.clamp(min=0.05)[:, None]
    present = (scenes.count > which)[:, None, None]
    depth = whole[:, 3] * scale + v0 / SIN * COS - height * SIN
    return RenderLayer(shaded(whole[:, :3], constants.rgb[scenes.colour[:, which]]), coverage * present, depth)


def sampled(sprites: Tensor, u0: Tensor, v0: Tensor, scale: Tensor, size: int) -> Tensor:
    """(B, 5, S, S): sprites with their foot at (u0, v0), at a scale; each of these () or (B, 1, 1)."""
    u, v = screen(size, sprites.device)
    x = (u - u0) / scale / EXTENT
    y = (CENTRE - (v - v0) / scale) / EXTENT
    grid = torch.stack([x, y], -1).expand(len(sprites), size, size, 2)
    return F.grid_sample(sprites, grid, align_corners=False)


def shaded(normal: Tensor, rgb: Tensor) -> Tensor:
    """(B, 3, S, S): Blinn's shading (1977) of colours (B, 3); highlights go to white and keep the hue."""
    constants = _constants(normal.device)
    normal = normal + 1e-6
    normal = normal / normal.square().sum(1, keepdim=True).sqrt()  # F.normalize takes three times as long
    diffuse = torch.einsum("bchw,c->bhw", normal, constants.light).clamp(min=0)
    gloss = 0.30 * torch.einsum("bchw,c->bhw", normal, constants.halfway).clamp(min=0) ** 40
    light = 0.31 + 0.10 * normal[:, 2] + 0.60 * diffuse
    body = rgb[:, :, None, None] * light[:, None]
    return body + gloss[:, None] * (1 - body)
