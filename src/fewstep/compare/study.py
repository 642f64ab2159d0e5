"""A blind comparison: pairs of images under neutral names, and the key that maps each image to its model."""

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
"""Stands for a model in pairs that check a rater's attention: its image is another prompt's, cut up and shuffled."""
FORMAT = 1
TILES = 8


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One model's images, one for each prompt, and the settings they were generated with."""

    settings: Mapping[str, Any]
    images: Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images for one prompt, `pictures/<id>-1.png` and `pictures/<id>-2.png`.

    `drawn_by` and `sha256` are of image 1 and image 2.
    """

    id: str
    prompt: str
    drawn_by: tuple[str, str]
    sha256: tuple[str, str]

    @property
    def is_check(self) -> bool:
        """Whether it is an attention check: one of the images is scrambled."""
        return SCRAMBLED in self.drawn_by

    @property
    def paths(self) -> tuple[str, str]:
        """The two images' paths within the folder of the study."""
        return f"pictures/{self.id}-1.png", f"pictures/{self.id}-2.png"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The pairs in the order of their ids; `models` maps the labels to the settings of each model."""

    seed: int
    models: Mapping[str, Mapping[str, Any]]
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole key: votes carry it, so that the key cannot change after them."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the key."""
        key = {"fewstep_study": FORMAT, "digest": self.digest, **asdict(self)}
        return json.dumps(key, indent=2, ensure_ascii=False) + "\n"


def make_study(
    image_sets: Mapping[str, ImageSet], prompts: Sequence[str], folder: Path, *, seed: int, checks: int
) -> Study:
    """Write a study to the new `folder`: the page for raters, its images, and the key, which they must not see.

    Every two of the models, by their labels in `image_sets`, are compared on every prompt. Order and sides follow from
    `seed`, each model being image 1 in half of its pairs. `checks` pairs, at most one a prompt, test attention.
    Raises InputError for fewer than two models, or a folder that holds something.
    """
    check_vacant(folder)
    if len(image_sets) < 2:
        raise InputError(f"{len(image_sets)} models; name at least two to compare")
    rng = random.Random(seed)
    planned = [*_comparisons(image_sets, rng), *_attention_checks(image_sets, min(checks, len(prompts)), rng)]
    rng.shuffle(planned)
    with partial_folder(folder) as partial:
        (partial / "pictures").mkdir(parents=True)
        pairs = [
            _write_pair(partial, f"{number:04d}", prompts[index], sides)
            for number, (index, sides) in enumerate(planned, start=1)
        ]
        study = Study(seed=seed, models={label: image_sets[label].settings for label in image_sets}, pairs=tuple(pairs))
        items = [(pair.id, pair.prompt) for pair in pairs]
        (partial / "index.html").write_text(page(study.digest, items), encoding="utf-8")
        (partial / KEY).write_text(study.to_json(), encoding="utf-8")
    return study


def check_vacant(folder: Path) -> None:
    """InputError if `folder` exists and is not empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name a new folder, votes may hang on this one")


def read_study(folder: Path) -> Study:
    """The study in `folder`; InputError if there is none, or if its key or an image has changed."""
    path = folder / KEY
    if not path.is_file():
        raise InputError(f"{folder} has no {KEY}; name the folder that fewstep compare wrote with --out")
    try:
        study, digest = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or of another version of fewstep: {error}") from error
    if study.digest != digest:
        raise InputError(f"{path} has been changed: its digest is not the one that it states; take the original")
    for pair in study.pairs:
        for image, sha256 in zip(pair.paths, pair.sha256, strict=True):
            if not (folder / image).is_file() or checksum(folder / image) != sha256:
                raise InputError(f"{folder / image} is gone or has changed since the study was made; votes are void")
    return study


Sides = tuple[tuple[str, Image.Image], tuple[str, Image.Image]]


def _comparisons(image_sets: Mapping[str, ImageSet], rng: random.Random) -> Iterator[tuple[int, Sides]]:
    """(index of the prompt, both sides) of all pairs."""
    for first, second in combinations(image_sets, 2):
        images = list(zip(image_sets[first].images, image_sets[second].images, strict=True))
        swaps = _balanced_swaps(len(images), rng)
        for index, (a, b) in enumerate(images):
            yield index, _swapped(((first, a), (second, b)), swaps[index])


def _attention_checks(
    image_sets: Mapping[str, ImageSet], count: int, rng: random.Random
) -> Iterator[tuple[int, Sides]]:
    labels = list(image_sets)
    swaps = _balanced_swaps(count, rng)
    for number in range(count):
        label = labels[number % len(labels)]
        images = image_sets[label].images
        index = rng.randrange(len(images))
        other = scramble_tiles(images[(index + 1) % len(images)], rng)
        yield index, _swapped(((label, images[index]), (SCRAMBLED, other)), swaps[number])


def _balanced_swaps(count: int, rng: random.Random) -> list[bool]:
    """True for half of `count`, in random order; for the odd one by chance."""
    halves = [number < count // 2 for number in range(count)]
    if count % 2:
        halves[-1] = rng.random() < 0.5
    rng.shuffle(halves)
    return halves


def _swapped(sides: Sides, turn: bool) -> Sides:
    return (sides[1], sides[0]) if turn else sides


def scramble_tiles(image: Image.Image, rng: random.Random) -> Image.Image:
    """`image` with its 8 x 8 tiles shuffled, which no attentive rater prefers."""
    width, height = (side // TILES for side in image.size)
    places = [(x * width, y * height) for y in range(TILES) for x in range(TILES)]
    result = image.copy()
    for (x, y), place in zip(places, rng.sample(places, len(places)), strict=True):
        result.paste(image.crop((x, y, x + width, y + height)), place)
    return result


def _write_pair(folder: Path, name: str, prompt: str, sides: Sides) -> Pair:
    """A pair whose images are saved without metadata."""
    first, second = (label for label, _ in sides)
    pair = Pair(id=name, prompt=prompt, drawn_by=(first, second), sha256=("", ""))
    for (_, image), path in zip(sides, pair.paths, strict=True):
        Image.frombytes("RGB", image.size, image.convert("RGB").tobytes()).save(folder / path, format="PNG")
    one, two = (checksum(folder / path) for path in pair.paths)
    return Pair(id=name, prompt=prompt, drawn_by=(first, second), sha256=(one, two))


def _parse(key: Mapping[str, Any]) -> tuple[Study, str]:
    if key["fewstep_study"] != FORMAT:
        raise ValueError(f"its format is {key['fewstep_study']!r}, this version reads {FORMAT}")
    pairs = tuple(_parse_pair(entry) for entry in key["pairs"])
    return Study(seed=int(key["seed"]), models=dict(key["models"]), pairs=pairs), str(key["digest"])


def _parse_pair(entry: Mapping[str, Any]) -> Pair:
    (first, second), (one, two) = entry["drawn_by"], entry["sha256"]
    if not entry["id"].isalnum():  # it is part of a path
        raise ValueError(f"{entry['id']!r} is not the id of a pair")
    return Pair(id=entry["id"], prompt=entry["prompt"], drawn_by=(first, second), sha256=(one, two))
