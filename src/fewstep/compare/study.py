"""A blind comparison: pairs of pictures under neutral names, and the key that says which model drew which."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.compare.page import page
from fewstep.errors import InputError
from fewstep.files import checksum, partial_folder

KEY = "key.json"
SCRAMBLED = "(scrambled)"
"""Stands for a model in pairs that check a rater's attention: its picture is another prompt's, cut up and shuffled."""
FORMAT = 1
TILES = 8


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One model's pictures, one for each prompt, and the settings that they were drawn with."""

    settings: Mapping[str, Any]
    pictures: Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures for one prompt, `pictures/<id>-1.png` and `pictures/<id>-2.png`.

    `drawn_by` and `sha256` are of picture 1 and picture 2.
    """

    id: str
    prompt: str
    drawn_by: tuple[str, str]
    sha256: tuple[str, str]

    @property
    def is_check(self) -> bool:
        """Whether one of the pictures is plainly worse, to see that a rater looks."""
        return SCRAMBLED in self.drawn_by

    @property
    def paths(self) -> tuple[str, str]:
        """The two pictures' paths within the folder of the study."""
        return f"pictures/{self.id}-1.png", f"pictures/{self.id}-2.png"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, in the order of the pairs' ids; `models` are their labels with the settings of each."""

    seed: int
    models: Mapping[str, Mapping[str, Any]]
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it: votes carry it, so that the key cannot change after them."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the key."""
        key = {"fewstep_study": FORMAT, "digest": self.digest, **asdict(self)}
        return json.dumps(key, indent=2, ensure_ascii=False) + "\n"


def make_study(
    drawings: Mapping[str, Drawing], prompts: Sequence[str], folder: Path, *, seed: int, checks: int
) -> Study:
    """Write a study to the new `folder`: the page for raters, its pictures, and the key, which they must not see.

    Every two of the models, by their labels in `drawings`, are compared on every prompt. Order and sides follow from
    `seed`, each model being picture 1 in half of its pairs. `checks` pairs, at most one a prompt, test attention.
    Raises InputError for fewer than two models, or a folder that holds something.
    """
    check_vacant(folder)
    if len(drawings) < 2:
        raise InputError(f"{len(drawings)} models; name at least two to compare")
    chance = random.Random(seed)
    planned = [*_comparisons(drawings, chance), *_attention_checks(drawings, min(checks, len(prompts)), chance)]
    chance.shuffle(planned)
    with partial_folder(folder) as partial:
        (partial / "pictures").mkdir(parents=True)
        pairs = [
            _written(partial, f"{number:04d}", prompts[index], sides)
            for number, (index, sides) in enumerate(planned, start=1)
        ]
        study = Study(seed=seed, models={label: drawings[label].settings for label in drawings}, pairs=tuple(pairs))
        asked = [(pair.id, pair.prompt) for pair in pairs]
        (partial / "index.html").write_text(page(study.digest, asked), encoding="utf-8")
        (partial / KEY).write_text(study.to_json(), encoding="utf-8")
    return study


def check_vacant(folder: Path) -> None:
    """InputError if a study cannot be written to `folder`, since something is there."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name a new folder, votes may hang on this one")


def read_study(folder: Path) -> Study:
    """The study in `folder`; InputError if there is none, or if its key or a picture has changed."""
    path = folder / KEY
    if not path.is_file():
        raise InputError(f"{folder} has no {KEY}; name the folder that fewstep compare wrote with --out")
    try:
        study, digest = _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or of another version of fewstep: {error}") from error
    if study.digest != digest:
        raise InputError(f"{path} has been changed: its digest is not the one that it states; take the original")
    for pair in study.pairs:
        for picture, sha256 in zip(pair.paths, pair.sha256, strict=True):
            if not (folder / picture).is_file() or checksum(folder / picture) != sha256:
                raise InputError(f"{folder / picture} is gone or has changed since the study was made; votes are void")
    return study


Sides = tuple[tuple[str, Image.Image], tuple[str, Image.Image]]


def _comparisons(drawings: Mapping[str, Drawing], chance: random.Random) -> Iterator[tuple[int, Sides]]:
    """(index of the prompt, both sides) of all pairs."""
    for first, second in combinations(drawings, 2):
        pictures = list(zip(drawings[first].pictures, drawings[second].pictures, strict=True))
        turned = _halves(len(pictures), chance)
        for index, (a, b) in enumerate(pictures):
            yield index, _turned(((first, a), (second, b)), turned[index])


def _attention_checks(
    drawings: Mapping[str, Drawing], count: int, chance: random.Random
) -> Iterator[tuple[int, Sides]]:
    labels = list(drawings)
    turned = _halves(count, chance)
    for number in range(count):
        label = labels[number % len(labels)]
        pictures = drawings[label].pictures
        index = chance.randrange(len(pictures))
        other = scrambled(pictures[(index + 1) % len(pictures)], chance)
        yield index, _turned(((label, pictures[index]), (SCRAMBLED, other)), turned[number])


def _halves(count: int, chance: random.Random) -> list[bool]:
    """True for half of `count`, in random order; for the odd one by chance."""
    halves = [number < count // 2 for number in range(count)]
    if count % 2:
        halves[-1] = chance.random() < 0.5
    chance.shuffle(halves)
    return halves


def _turned(sides: Sides, turn: bool) -> Sides:
    return (sides[1], sides[0]) if turn else sides


def scrambled(picture: Image.Image, chance: random.Random) -> Image.Image:
    """`picture` cut into 8 x 8 tiles that are shuffled: nothing that anybody would prefer."""
    width, height = (side // TILES for side in picture.size)
    places = [(x * width, y * height) for y in range(TILES) for x in range(TILES)]
    result = picture.copy()
    for (x, y), place in zip(places, chance.sample(places, len(places)), strict=True):
        result.paste(picture.crop((x, y, x + width, y + height)), place)
    return result


def _written(folder: Path, name: str, prompt: str, sides: Sides) -> Pair:
    """A pair whose pictures are saved without any note of what drew them."""
    first, second = (label for label, _ in sides)
    pair = Pair(id=name, prompt=prompt, drawn_by=(first, second), sha256=("", ""))
    for (_, picture), path in zip(sides, pair.paths, strict=True):
        Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes()).save(folder / path, format="PNG")
    one, two = (checksum(folder / path) for path in pair.paths)
    return Pair(id=name, prompt=prompt, drawn_by=(first, second), sha256=(one, two))


def _parsed(key: Mapping[str, Any]) -> tuple[Study, str]:
    if key["fewstep_study"] != FORMAT:
        raise ValueError(f"its format is {key['fewstep_study']!r}, this version reads {FORMAT}")
    pairs = tuple(_parsed_pair(entry) for entry in key["pairs"])
    return Study(seed=int(key["seed"]), models=dict(key["models"]), pairs=pairs), str(key["digest"])


def _parsed_pair(entry: Mapping[str, Any]) -> Pair:
    (first, second), (one, two) = entry["drawn_by"], entry["sha256"]
    if not entry["id"].isalnum():  # it is part of a path
        raise ValueError(f"{entry['id']!r} is not the id of a pair")
    return Pair(id=entry["id"], prompt=entry["prompt"], drawn_by=(first, second), sha256=(one, two))
