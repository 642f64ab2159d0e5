"""Which scenes are trained on, and which are kept for the exam.

A scene's key leaves out pose, place and backdrop. Two objects: `red cube|on top of|blue sphere`, without
sizes, "A right of B" stored as "B left of A". One object: `small red cube`. The key alone decides the split:

- `unseen_atoms`: the key holds one of the four colour-shape atoms in `UNSEEN_ATOMS`.
- `heldout`: otherwise, two objects whose key has a blake2b digest divisible by 10, and always `HERO`;
  or one object whose colour and shape have a digest divisible by 5, at the size that the next bit names.
- `train`: all others.

No pair of any split is drawn with a size, colour and shape that are held out together as a single object:
training never shows those at all, and a held-out pair is new in its combination only.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from itertools import product

from fewstep.blockworld.scene import COLOURS, RELATIONS, RIGHT, SHAPES, SIZES, Scenes
from fewstep.errors import InputError

SPLITS: tuple[str, ...] = ("train", "heldout", "unseen_atoms")
UNSEEN_ATOMS = frozenset({"cyan torus", "pink pyramid", "orange cone", "purple cube"})
HERO = "red cube|on top of|blue sphere"


def single_key(size: int, colour: int, shape: int) -> str:
    """`"small red cube"`: the key of a scene with one object."""
    return f"{SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"


def pair_key(first: tuple[int, int], relation: int, second: tuple[int, int]) -> str:
    """`"red cube|on top of|blue sphere"` from two (colour, shape) and their relation, mirrors folded."""
    if relation == RIGHT:
        first, relation, second = second, RIGHT - 1, first
    (c0, s0), (c1, s1) = first, second
    return f"{COLOURS[c0]} {SHAPES[s0]}|{RELATIONS[relation]}|{COLOURS[c1]} {SHAPES[s1]}"


def keys(scenes: Scenes) -> list[str]:
    """The canonical key of each scene."""
    rows = zip(
        scenes.count.tolist(),
        scenes.colour.tolist(),
        scenes.shape.tolist(),
        scenes.size.tolist(),
        scenes.relation.tolist(),
        strict=True,
    )
    return [
        single_key(z[0], c[0], s[0]) if count == 1 else pair_key((c[0], s[0]), relation, (c[1], s[1]))
        for count, c, s, z, relation in rows
    ]


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")


@cache
def split_of(key: str) -> str:
    """The split, one of `SPLITS`, that the scenes of a canonical key belong to."""
    parts = key.split("|")
    if any(" ".join(part.split()[-2:]) in UNSEEN_ATOMS for part in parts[::2]):
        return "unseen_atoms"
    held_out = _pair_held_out(key) if len(parts) == 3 else _single_held_out(key)
    return "heldout" if held_out else "train"


def _pair_held_out(key: str) -> bool:
    return key == HERO or _digest(key) % 10 == 0


def _single_held_out(key: str) -> bool:
    size, atom = key.split(" ", 1)
    turn, rest = divmod(_digest(atom), 5)
    return rest == 0 and SIZES[turn % 2] == size


def require_train(scenes: Scenes) -> None:
    """Raise `InputError` unless every scene may be trained on."""
    for key in keys(scenes):
        if (split := split_of(key)) != "train":
            raise InputError(
                f"scene {key!r} belongs to the split {split!r} and must not be trained on; "
                f"draw training scenes with scenes(..., split='train')"
            )


def all_keys() -> tuple[str, ...]:
    """Every canonical key of the world, singles first; the two colours of a pair differ."""
    atoms = list(product(range(len(COLOURS)), range(len(SHAPES))))
    singles = [single_key(z, c, s) for z in range(len(SIZES)) for c, s in atoms]
    relations = [r for r in range(1, len(RELATIONS)) if r != RIGHT]
    pairs = [pair_key(a, r, b) for a, r, b in product(atoms, relations, atoms) if a[0] != b[0]]
    return (*singles, *pairs)


def split_digest() -> str:
    """16 hex digits over all keys that are not trained on: what weights carry to say what they never saw."""
    held = sorted(key for key in all_keys() if split_of(key) != "train")
    return blake2b("\n".join(held).encode(), digest_size=8).hexdigest()
