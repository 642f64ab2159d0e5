"""Drawing scenes: every allowed combination is equally likely, then the objects are placed."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from fewstep.blockworld.layout import placed
from fewstep.blockworld.scene import ALONE, COLOURS, ON_TOP, RELATIONS, SHAPES, SIZES, Scenes
from fewstep.blockworld.split import SPLITS, pair_key, single_key, split_of
from fewstep.errors import InputError, unknown

Solid = tuple[int, int, int]  # size, colour, shape
POINTED = (SHAPES.index("cone"), SHAPES.index("pyramid"))
TURNS = 8


def scenes(count: int, *, seed: int, split: str = "train", single: float = 0.3) -> Scenes:
    """`count` scenes of a split, a share `single` of them (on average) with one object.

    The combinations of a split are equally likely, and so, nearly, are shapes, colours and relations. The
    same arguments give the same scenes. `InputError` for an unknown split or a share outside [0, 1].
    """
    if split not in SPLITS:
        raise InputError(unknown("split", split, SPLITS))
    if not 0 <= single <= 1:
        raise InputError(f"single is {single}; it is the share of one-object scenes, between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.where(
        torch.rand(count, 1, generator=generator) < single,
        _drawn(_singles(split), count, generator),
        _drawn(_pairs(split), count, generator),
    )
    return placed(rows, generator)


def _drawn(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return pool[torch.randint(len(pool), (count,), generator=generator)]


def _solids() -> list[Solid]:
    return list(product(range(len(SIZES)), range(len(COLOURS)), range(len(SHAPES))))


@cache
def _singles(split: str) -> Tensor:
    """(N, 7) rows of size, colour, shape twice, then relation; the second object is all 0."""
    rows = [(*solid, 0, 0, 0, ALONE) for solid in _solids() if split_of(single_key(*solid)) == split]
    return torch.tensor(rows)


@cache
def _pairs(split: str) -> Tensor:
    """(N, 7) rows of size, colour, shape twice, then relation."""
    rows = [
        (*first, *second, relation)
        for first, second in product(_solids(), repeat=2)
        for relation in range(1, len(RELATIONS))
        if _in_split(first, relation, second, split)
    ]
    return torch.tensor(rows)


def _in_split(first: Solid, relation: int, second: Solid, split: str) -> bool:
    if first[1] == second[1] or _mostly_hidden(first, relation, second):
        return False
    if any(split_of(single_key(*solid)) == "heldout" for solid in (first, second)):
        return False
    return bool(split_of(pair_key(first[1:], relation, second[1:])) == split)


def _mostly_hidden(first: Solid, relation: int, second: Solid) -> bool:
    """A large solid on a small pointed one would hide what it stands on."""
    return relation == ON_TOP and first[0] > second[0] and second[2] in POINTED
