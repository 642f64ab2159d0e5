"""What scenes are called."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from fewstep.blockworld.scene import (
    COLOURS,
    IN_FRONT,
    LEFT,
    ON_TOP,
    RELATIONS,
    RIGHT,
    SHAPES,
    SIZES,
    Scenes,
)
from fewstep.errors import InputError

Style = Literal["varied", "canonical"]
Solid = tuple[int, int, int]  # size, colour, shape

WORDINGS: dict[int, tuple[str, ...]] = {
    ON_TOP: ("on top of",),
    LEFT: ("left of", "to the left of"),
    RIGHT: ("right of", "to the right of"),
    IN_FRONT: ("in front of",),
}
MIRRORED: dict[int, tuple[str, ...]] = {ON_TOP: ("under", "below"), IN_FRONT: ("behind",)}
"""Wordings that name object 1 first."""
SIZE_WORDS: tuple[tuple[str, ...], ...] = (("small", "little"), ("large", "big"))
OPENINGS: tuple[str, ...] = ("a photo of", "a picture of", "an image of", "there is")

NAMED, SYNONYM, MIRROR, OPENING = 0.5, 0.2, 0.2, 0.15
"""Chances of a size word, of its second form, of a mirrored wording where there is one, and of an opening."""


def captions(scenes: Scenes, *, seed: int, style: Style) -> list[str]:
    """One caption a scene, lower case, deterministic in the arguments.

    `canonical`: one object with its size, "a small green torus"; two without, "a red cube on top of a blue
    sphere". The exam uses these: a held-out scene's canonical caption is never said of a training scene.
    `varied`: size words in half of the noun phrases, and now and then a synonym, an opening ("a photo of")
    or a mirrored wording ("under", "behind": 10 % of the pairs). `InputError` for another style.
    """
    if style not in ("varied", "canonical"):
        raise InputError(f"unknown caption style {style!r}; there are 'varied' and 'canonical'")
    say: Callable[[random.Random, list[Solid], int], str] = _varied if style == "varied" else _canonical
    chance = random.Random(seed)
    solids = list(zip(*(f.tolist() for f in (scenes.size, scenes.colour, scenes.shape)), strict=True))
    counts, relations = scenes.count.tolist(), scenes.relation.tolist()
    return [
        say(chance, list(zip(*solid, strict=True))[:count], relation)
        for solid, count, relation in zip(solids, counts, relations, strict=True)
    ]


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, lower case, sorted."""
    phrases = [*RELATIONS[1:], *COLOURS, *SHAPES, *SIZES, *OPENINGS, "a", "an"]
    for group in (*WORDINGS.values(), *MIRRORED.values(), *SIZE_WORDS):
        phrases.extend(group)
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def stated_sizes(captions: Sequence[str], scenes: Scenes) -> list[dict[int, int]]:
    """For each caption of a scene, the sizes that it states: from an object's colour to its size, as indices."""
    stated = []
    for caption, colours, sizes in zip(captions, scenes.colour.tolist(), scenes.size.tolist(), strict=True):
        solids = zip(colours, sizes, strict=True)
        stated.append({c: z for c, z in solids if any(f"{word} {COLOURS[c]} " in caption for word in SIZE_WORDS[z])})
    return stated


def _canonical(chance: random.Random, solids: list[Solid], relation: int) -> str:
    del chance
    if len(solids) == 1:
        size, colour, shape = solids[0]
        return _with_article(f"{SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}")
    first, second = (_with_article(f"{COLOURS[colour]} {SHAPES[shape]}") for _, colour, shape in solids)
    return f"{first} {RELATIONS[relation]} {second}"


def _varied(chance: random.Random, solids: list[Solid], relation: int) -> str:
    phrases = [_noun_phrase(chance, solid) for solid in solids]
    if len(phrases) == 1:
        caption = phrases[0]
    elif relation in MIRRORED and chance.random() < MIRROR:
        caption = f"{phrases[1]} {chance.choice(MIRRORED[relation])} {phrases[0]}"
    else:
        caption = f"{phrases[0]} {chance.choice(WORDINGS[relation])} {phrases[1]}"
    return f"{chance.choice(OPENINGS)} {caption}" if chance.random() < OPENING else caption


def _noun_phrase(chance: random.Random, solid: Solid) -> str:
    size, colour, shape = solid
    named = chance.random() < NAMED
    word = SIZE_WORDS[size][chance.random() < SYNONYM]
    noun = f"{COLOURS[colour]} {SHAPES[shape]}"
    return _with_article(f"{word} {noun}" if named else noun)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
