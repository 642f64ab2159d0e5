"""How well readings of block pictures agree with the scenes that the prompts describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewstep.blockworld.captions import stated_sizes
from fewstep.blockworld.detector import SceneReading
from fewstep.blockworld.scene import LEFT, RIGHT, Scenes
from fewstep.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Grades:
    """Shares of pictures that show what their scene says; `images` holds `exact` picture by picture.

    `count`: the number of objects. `colours`: and their colours. `shapes_bag`: and their shapes, on whichever
    object. `shapes_bound`: each shape on its colour. `size`: each size that the prompt says, on its colour.
    `exact`: count, colours, bound shapes, the sizes that are said and, of two objects, the directed relation.
    `relation_kind`: of the scenes with two objects, those with the right colours and a relation of the same
    kind, left and right being one. `direction`: of these, those with the right object first.
    A share of nothing is 0.
    """

    count: float
    colours: float
    shapes_bag: float
    shapes_bound: float
    relation_kind: float
    direction: float
    size: float
    exact: float
    images: tuple[bool, ...]


def grade(readings: Sequence[SceneReading], scenes: Scenes, prompts: Sequence[str]) -> Grades:
    """How well readings agree with the scenes that `prompts` asked for; one of each for a picture, else `InputError`.

    A size that a prompt leaves open is not graded.
    """
    if not len(readings) == len(scenes) == len(prompts):
        raise InputError(f"{len(readings)} readings, {len(scenes)} scenes, {len(prompts)} prompts; give one of each")
    marks = [
        _marks(reading, expected, sizes)
        for reading, expected, sizes in zip(readings, _expected(scenes), stated_sizes(prompts, scenes), strict=True)
    ]
    pairs = [mark for mark, count in zip(marks, scenes.count.tolist(), strict=True) if count == 2]
    kinds = [mark for mark in pairs if mark["relation_kind"]]
    whole = ("count", "colours", "shapes_bag", "shapes_bound", "size", "exact")
    return Grades(
        **{name: _share(marks, name) for name in whole},
        relation_kind=_share(pairs, "relation_kind"),
        direction=_share(kinds, "direction"),
        images=tuple(mark["exact"] for mark in marks),
    )


def _share(marks: Sequence[dict[str, bool]], name: str) -> float:
    return sum(mark[name] for mark in marks) / len(marks) if marks else 0.0


def _expected(scenes: Scenes) -> list[SceneReading]:
    """The readings of perfect pictures."""
    expected = []
    for i, (count, relation) in enumerate(zip(scenes.count.tolist(), scenes.relation.tolist(), strict=True)):
        order = [1, 0] if relation == RIGHT else list(range(count))
        colours, shapes, sizes = (tuple(f[i, order].tolist()) for f in (scenes.colour, scenes.shape, scenes.size))
        kind = LEFT if relation == RIGHT else relation
        expected.append(SceneReading(count=count, colours=colours, shapes=shapes, sizes=sizes, relation=kind, fit=1.0))
    return expected


def _marks(read: SceneReading, expected: SceneReading, sizes: Mapping[int, int]) -> dict[str, bool]:
    counted = read.count == expected.count
    colours = counted and sorted(read.colours) == sorted(expected.colours)
    bag = colours and sorted(read.shapes) == sorted(expected.shapes)
    bound = bag and _by_colour(read, read.shapes) == _by_colour(expected, expected.shapes)
    size = colours and sizes.items() <= _by_colour(read, read.sizes).items()
    kind = colours and read.relation == expected.relation
    direction = kind and read.colours == expected.colours
    return {
        "count": counted,
        "colours": colours,
        "shapes_bag": bag,
        "shapes_bound": bound,
        "size": size,
        "relation_kind": kind,
        "direction": direction,
        "exact": bound and size and direction,
    }


def _by_colour(reading: SceneReading, values: Sequence[int]) -> dict[int, int]:
    return dict(zip(reading.colours, values, strict=True))
