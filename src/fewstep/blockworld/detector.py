"""An algorithmic detector for pictures of the block world: no network, nothing learned.

Hues are segmented into regions, each of the two largest is matched against the silhouettes and the shading of
every solid, and the relation follows from where the matched solids stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.blockworld.layout import COS, FRONT_ASIDE, FRONT_DEPTH, SIN
from fewstep.blockworld.render import sampled, screen, shaded
from fewstep.blockworld.scene import (
    ALONE,
    COLOURS,
    HALF_WIDTHS,
    IN_FRONT,
    LEFT,
    ON_TOP,
    RADII,
    RGB,
    SEATS,
)
from fewstep.blockworld.sprites import sprite_bank, sprite_poses
from fewstep.errors import InputError

GROUND = len(COLOURS)
"""The label of pixels that belong to no object."""
SHADING_WEIGHT = 0.6
CANDIDATES = 12
"""Solids whose shading is compared, the best silhouettes first."""
MINIMUM_FIT = 0.6
"""A region that overlaps less with every solid has an unreadable shape."""
UNREADABLE = -1
REACH = 0.5
"""How far, in summed half widths, an object may stand from the place that its relation names."""


@dataclass(frozen=True, kw_only=True)
class SceneReading:
    """What one picture shows: up to two objects, object 0 being on top, left, or in front.

    `count` is the number of objects, of which the two largest are described. Shapes, colours, sizes and the
    relation index the names in `fewstep.blockworld`; an unreadable shape is -1. `relation` is 0,
    "alone", unless two objects stand in a readable relation, and never "right of".
    `fit` is the smallest overlap, in [0, 1], of a region with the silhouette that was matched to it.
    """

    count: int
    shapes: tuple[int, ...] = ()
    colours: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    relation: int = ALONE
    fit: float = 0.0


class SilhouetteMatch(NamedTuple):
    """A solid found in a picture: its foot at (u, v), its overlap with the region, its silhouette (S, S)."""

    shape: int
    size: int
    u: float
    v: float
    fit: float
    mask: Tensor

    @property
    def half_width(self) -> float:
        """Half the width of the solid on the picture, which is 2 wide."""
        return float(HALF_WIDTHS[self.shape] * RADII[self.size])

    @property
    def lift(self) -> float:
        """How far above its foot, on the picture, something stands that rests on the solid."""
        return float(SEATS[self.shape] * RADII[self.size]) * COS


class BlockReader:
    """Reads pictures of `size` x `size` pixels, at least 32 (else `InputError`)."""

    def __init__(self, size: int) -> None:
        if size < 32:
            raise InputError(f"size is {size}; pictures below 32 pixels cannot be read")
        self.size = size
        self.pixels = (size / 64) ** 2  # areas are given for 64 pixels
        self.solids, self.masks, self.lights = _templates(size)
        self.spectra = torch.fft.rfft2(self.masks).conj()

    @torch.no_grad()
    def read(self, images: Tensor) -> list[SceneReading]:
        """One reading for each of images (B, 3, size, size) in [-1, 1]; `InputError` for another shape."""
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size):
            expected = f"(B, 3, {self.size}, {self.size})"
            raise InputError(f"images have shape {tuple(images.shape)}; this reader takes {expected}")
        pictures = (images.float().clamp(-1, 1) + 1) / 2
        pairs = zip(segmented(pictures), pictures.amax(1), strict=True)
        return [self._reading(labels, values) for labels, values in pairs]

    def _reading(self, labels: Tensor, values: Tensor) -> SceneReading:
        colours = self._objects(labels)
        found = [(colour, self._match(labels, values, colour)) for colour in colours[:2]]
        count = len(colours) + sum(self._has_second_object(labels == colour, match) for colour, match in found)
        relation = ALONE
        if len(found) == 2:
            relation, swapped = related(found[0][1], found[1][1])
            found = found[::-1] if swapped else found
        return SceneReading(
            count=count,
            colours=tuple(colour for colour, _ in found),
            shapes=tuple(match.shape if match.fit >= MINIMUM_FIT else UNREADABLE for _, match in found),
            sizes=tuple(match.size for _, match in found),
            relation=relation,
            fit=min((match.fit for _, match in found), default=0.0),
        )

    def _objects(self, labels: Tensor) -> list[int]:
        """Colours that form an object, the largest first.

        A soft border between two hues shows a third. Such a fringe is thin: erosion leaves little of it.
        """
        regions = F.one_hot(labels, GROUND + 1).permute(2, 0, 1)[:GROUND].float()
        areas, cores = regions.sum((1, 2)) / self.pixels, _eroded(regions).sum((1, 2)) / self.pixels
        colours = [c for c in areas.argsort(descending=True).tolist() if areas[c] >= 30 and cores[c] >= 6]
        return [c for c in colours if not (cores[c] < 60 and _is_fringe(c, colours, cores))]

    def _match(self, labels: Tensor, values: Tensor, colour: int) -> SilhouetteMatch:
        """The solid whose silhouette and shading fit a colour's region best; other objects may hide parts."""
        region = (labels == colour).float()
        free = ((labels == colour) | (labels == GROUND)).float()
        overlap, shown = self._correlated(region), self._correlated(free)
        fits = (overlap / (shown + region.sum() - overlap).clamp(min=1)).flatten(1)
        best, shift = fits.max(1)
        candidates = best.topk(CANDIDATES).indices.tolist()
        scores = [
            float(best[i]) + SHADING_WEIGHT * self._shading_fit(i, int(shift[i]), region, values) for i in candidates
        ]
        chosen = candidates[scores.index(max(scores))]
        return self._aligned(chosen, int(shift[chosen]), float(best[chosen]))

    def _correlated(self, field: Tensor) -> Tensor:
        """(N, S, S): the sum of a field (S, S) under every silhouette at every shift."""
        spectra = self.spectra * torch.fft.rfft2(field)
        sums: Tensor = torch.fft.irfft2(spectra, s=(self.size, self.size))
        return sums

    def _shading_fit(self, template: int, shift: int, region: Tensor, values: Tensor) -> float:
        """Correlation in [-1, 1] of the picture's light with a template's, where both show the object."""
        mask = (self._shifted(self.masks[template], shift) * region).bool()
        if mask.sum() < 8:
            return -1.0
        seen, expected = values[mask], self._shifted(self.lights[template], shift)[mask]
        seen, expected = seen - seen.mean(), expected - expected.mean()
        spread = ((seen.square().mean() + 4e-4) * (expected.square().mean() + 4e-4)).sqrt()
        return float((seen * expected).mean() / spread)

    def _shifted(self, field: Tensor, shift: int) -> Tensor:
        return torch.roll(field, divmod(shift, self.size), (0, 1))

    def _aligned(self, template: int, shift: int, fit: float) -> SilhouetteMatch:
        """The match of a template moved by a flat index of rows and columns, which wrap around."""
        size, middle = self.size, self.size // 2
        row, column = ((s + middle) % size for s in divmod(shift, size))
        u, v = screen(size)
        shape, kind = self.solids[template]
        mask = self._shifted(self.masks[template], shift)
        return SilhouetteMatch(shape, kind, float(u[row, column]), float(v[row, column]), fit, mask)

    def _has_second_object(self, region: Tensor, match: SilhouetteMatch) -> bool:
        """Whether a region goes on beyond its solid: a second object of the same colour."""
        covered = F.max_pool2d(match.mask[None], 5, 1, 2)
        rest = region.float()[None] * (1 - covered)
        return bool(_eroded(rest).sum() >= 12 * self.pixels)


def _eroded(regions: Tensor) -> Tensor:
    return -F.max_pool2d(-regions, 3, 1, 1)


def _templates(size: int) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """(shape, size) of N solids, their silhouettes and light (N, S, S), with the foot on the middle pixel."""
    poses, bank = sprite_poses(), sprite_bank(size)
    u, v = screen(size)
    middle = size // 2
    layers = [sampled(bank, u[middle, middle], v[middle, middle], radius, size) for radius in RADII]
    solids = [(shape, kind) for kind in range(len(RADII)) for shape, _ in poses]
    sprites = torch.cat(layers)
    masks = (sprites[:, 4] > 0.5).float()
    normals = sprites[:, :3] / sprites[:, 4:].clamp(min=0.05)
    return solids, masks, shaded(normals, torch.full((len(sprites), 3), 0.9)).amax(1) * masks


def hues(rgb: Tensor) -> Tensor:
    """Degrees in [0, 360) of (..., 3, H, W) in [0, 1] -> (..., H, W); grey has 0."""
    red, green, blue = rgb.unbind(-3)
    y, x = 3**0.5 * (green - blue), 2 * red - green - blue
    return torch.rad2deg(torch.atan2(y, x)) % 360


PALETTE = hues(RGB[:, :, None, None]).flatten()


def _hue_difference(start: Tensor, end: Tensor) -> Tensor:
    """Signed degrees from one hue to another, in [-180, 180)."""
    return (end - start + 180) % 360 - 180


def segmented(pictures: Tensor) -> Tensor:
    """(B, S, S) labels of pictures (B, 3, S, S) in [0, 1]: a colour's index or `GROUND`, without specks."""
    chroma, value = pictures.amax(1) - pictures.amin(1), pictures.amax(1)
    nearest = _hue_difference(PALETTE[:, None, None], hues(pictures)[:, None]).abs().argmin(1)
    coloured = (chroma > 0.16) & (chroma > 0.30 * value)
    votes = F.one_hot(torch.where(coloured, nearest, GROUND), GROUND + 1).permute(0, 3, 1, 2).float()
    smooth = F.avg_pool2d(F.pad(votes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (smooth + 0.01 * votes).argmax(1)


def _is_fringe(colour: int, colours: Sequence[int], cores: Tensor) -> bool:
    """Whether a colour is the blend of two others that have more than twice its core between them."""
    others = [other for other in colours if other != colour]
    return any(
        _between(colour, a, b) and cores[colour] < 0.5 * max(cores[a], cores[b]) for a, b in combinations(others, 2)
    )


def _between(colour: int, a: int, b: int) -> bool:
    whole, part = _hue_difference(PALETTE[a], PALETTE[b]), _hue_difference(PALETTE[a], PALETTE[colour])
    return bool(whole * part > 0 and part.abs() < whole.abs())


def related(a: SilhouetteMatch, b: SilhouetteMatch) -> tuple[int, bool]:
    """The relation that two solids stand in, and whether b is its first object; `ALONE` when none is near.

    Each relation has a place for its first object relative to the second, in units of their summed half
    widths; the one that is nearest to where it stands is read, if within `REACH`.
    """
    readings = {(relation, False): gap for relation, gap in _gaps(a, b).items()}
    readings |= {(relation, True): gap for relation, gap in _gaps(b, a).items()}
    nearest = min(readings, key=lambda reading: readings[reading])
    return nearest if readings[nearest] <= REACH else (ALONE, False)


def _gaps(first: SilhouetteMatch, second: SilhouetteMatch) -> dict[int, float]:
    """How far `first` is from where it should be to stand on, left, or in front of `second`."""
    unit = first.half_width + second.half_width
    u, v, lift = (first.u - second.u) / unit, (first.v - second.v) / unit, second.lift / unit
    return {
        ON_TOP: math.hypot(u, v - lift),
        LEFT: math.hypot(max(0.0, 1.0 + u), v),
        IN_FRONT: math.hypot(abs(u) - sum(FRONT_ASIDE) / 2, v + SIN * sum(FRONT_DEPTH) / 2),
    }
