"""A learned detector for block pictures: a network, independent of the algorithmic `BlockReader`.

It was trained on renders alone (`recipes/second_reader.py`), never on drawn pictures, and no generator was ever trained
with it. For each cell of a 16 x 16 grid it says whether the middle of an object is there, what the object is, and which
part it plays beside another one; colours, shapes and relations are learned, none of the first reader's rules is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.blockworld.backbone import CHANNELS, Backbone, Residual, resized
from fewstep.blockworld.detector import UNREADABLE, SceneReading
from fewstep.blockworld.scene import ALONE, COLOURS, IN_FRONT, LEFT, ON_TOP, SHAPES, SIZES
from fewstep.weights.auxiliary import ASSETS, NetworkId, load_network

PARTS = ("none", "above", "below", "left", "right", "front", "behind")
"""The part an object plays beside another one."""
RELATION_OF_PARTS = {(0, 0): ALONE, (1, 2): ON_TOP, (3, 4): LEFT, (5, 6): IN_FRONT}
"""The relation that the parts of object 0 and object 1 make."""
HEADS = [1, len(COLOURS), len(SHAPES), len(SIZES), len(PARTS)]
GRID = 16
PRESENT, READABLE = 0.2, 0.5
"""How sure the network must be that an object is there, and of its shape. A middle may lie between two cells, and be
half as likely in either."""
BATCH = 100


class DetectedObject(NamedTuple):
    """One object found in a picture: how sure that is, what it is, and the log-probabilities (7,) of its part."""

    sure: float
    colour: int
    shape: int
    size: int
    parts: Tensor


class FindingNetwork(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, n, 16, 16) of each of `HEADS`: presence, colour, shape, ..."""

    def __init__(self) -> None:
        super().__init__()
        _, fine, middle, coarse = CHANNELS
        self.trunk = Backbone()
        self.up = nn.ModuleList([nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)])
        self.last = Residual(fine)
        self.heads = nn.Conv2d(fine, sum(HEADS), 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        fine, middle, coarse = self.trunk(pictures)
        to_middle, to_fine = self.up
        x = middle + F.interpolate(to_middle(coarse), scale_factor=2.0, mode="nearest")
        x = fine + F.interpolate(to_fine(x), scale_factor=2.0, mode="nearest")
        return torch.split(self.heads(F.relu(self.last(x))), HEADS, dim=1)


class SecondReader:
    """Reads square pictures of any size from 32 pixels on; it sees them at 64.

    Its readings go where those of `BlockReader` go. `fit` is how sure it is of the objects it describes.
    """

    def __init__(self, network: FindingNetwork | None = None) -> None:
        self.network = FindingNetwork() if network is None else network.eval()
        self.network_id = NetworkId(name="unnamed", digest="none")
        if network is None:
            self.network_id = load_network(ASSETS / "second-reader", self.network)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[SceneReading]:
        """One reading for each of images (B, 3, S, S) in [-1, 1]; `InputError` for another shape."""
        readings = []
        for batch in torch.split(images, BATCH):
            present, *logits = self.network(resized(batch.clamp(-1, 1)))
            highest = present == F.max_pool2d(present, 3, 1, 1)  # of logits: shares are 1 in many cells
            sure = present.sigmoid() * highest
            maps = [part.log_softmax(1) for part in logits]
            readings += [_reading(*one) for one in zip(sure[:, 0], *maps, strict=True)]
        return readings


def _reading(sure: Tensor, *maps: Tensor) -> SceneReading:
    """From the maps of one picture: sure (16, 16), 0 but at middles, then colour, shape, size and part (n, 16, 16)."""
    places = (sure >= PRESENT).nonzero().tolist()
    places.sort(key=lambda place: -float(sure[*place]))
    found = [_detected(float(sure[y, x]), *(part[:, y, x] for part in maps)) for y, x in places[:2]]
    relation = ALONE
    if len(found) == 2:
        relation, swapped = _related(*found)
        found = found[::-1] if swapped else found
    return SceneReading(
        count=len(places),
        colours=tuple(one.colour for one in found),
        shapes=tuple(one.shape for one in found),
        sizes=tuple(one.size for one in found),
        relation=relation,
        fit=min((one.sure for one in found), default=0.0),
    )


def _detected(sure: float, colour: Tensor, shape: Tensor, size: Tensor, parts: Tensor) -> DetectedObject:
    readable = float(shape.max().exp()) >= READABLE
    return DetectedObject(
        sure, int(colour.argmax()), int(shape.argmax()) if readable else UNREADABLE, int(size.argmax()), parts
    )


def _related(a: DetectedObject, b: DetectedObject) -> tuple[int, bool]:
    """The relation that the parts of two objects make most likely, and whether b is its first object."""
    scores = {
        (relation, swapped): float(one.parts[first] + other.parts[second])
        for (first, second), relation in RELATION_OF_PARTS.items()
        for swapped, one, other in ((False, a, b), (True, b, a))
    }
    return max(scores, key=lambda reading: scores[reading])


def parts_of(relation: int) -> Sequence[int]:
    """The parts that object 0 and object 1 play in a relation as read: never "right of"."""
    return next(parts for parts, made in RELATION_OF_PARTS.items() if made == relation)
