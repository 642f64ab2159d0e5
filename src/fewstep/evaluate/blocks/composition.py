"""Whether block pictures show what their prompts say: the exam, read by two readers that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.blockworld import Scenes, captions, scenes
from fewstep.blockworld.detector import BlockReader
from fewstep.blockworld.grading import Grades, grade
from fewstep.blockworld.learned_detector import SecondReader
from fewstep.errors import InputError
from fewstep.metrics.intervals import Interval, share_interval
from fewstep.metrics.pixels import Pictures, planes
from fewstep.tables import Cell

SEED = 2026
READERS = ("algorithm", "network")
MARKS = ("exact", "count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind", "direction")


class Part(NamedTuple):
    """A part of the exam: the split of its scenes, how many objects they have, and its share of the prompts."""

    split: str
    objects: int
    share: float


PARTS = {
    "one object, held out": Part("heldout", 1, 1.0),
    "two objects, held out": Part("heldout", 2, 1.0),
    "one object, colour and shape never together": Part("unseen_atoms", 1, 0.25),
    "two objects, colour and shape never together": Part("unseen_atoms", 2, 0.25),
    "one object, trained on": Part("train", 1, 0.25),
    "two objects, trained on": Part("train", 2, 0.25),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one part of the exam asks for: scenes and their canonical captions; picture i has the seed i."""

    part: str
    wanted: Scenes
    prompts: tuple[str, ...]

    @property
    def unasked(self) -> frozenset[str]:
        """The marks that its prompts say nothing about."""
        return frozenset({"relation_kind", "direction"} if PARTS[self.part].objects == 1 else {"size"})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The grades of one model's pictures for one question, by reader."""

    question: Question
    grades: dict[str, Grades]

    @property
    def count(self) -> int:
        """How many pictures there were."""
        return len(self.question.prompts)

    @property
    def agreement(self) -> Interval:
        """The share of pictures of which both readers say the same, right or wrong."""
        a, b = (self.grades[reader].images for reader in READERS)
        return share_interval(sum(x == y for x, y in zip(a, b, strict=True)) / self.count, self.count)

    def exact(self, reader: str) -> Interval:
        """The share that a reader finds right in everything, with its interval."""
        return share_interval(self.grades[reader].exact, self.count)

    def rows(self, model: str) -> list[dict[str, Cell]]:
        """One line of a table for each reader."""
        return [self._row(model, reader) for reader in READERS]

    def _row(self, model: str, reader: str) -> dict[str, Cell]:
        exact, unasked = self.exact(reader), self.question.unasked
        marks = {name: None if name in unasked else getattr(self.grades[reader], name) for name in MARKS}
        return {
            "model": model,
            "prompts": self.question.part,
            "reader": reader,
            "n": self.count,
            **marks,
            "exact_low": exact.low,
            "exact_high": exact.high,
            "readers_agree": self.agreement.value,
        }


def questions(count: int) -> list[Question]:
    """The exam with `count` held-out prompts of either kind, and a quarter of that of each other kind."""
    if count < 1:
        raise InputError(f"an exam of {count} prompts says nothing; ask for at least 1, and for 1000 to be sure")
    asked = []
    for name, part in PARTS.items():
        single, number = float(part.objects == 1), max(1, round(count * part.share))
        wanted = scenes(number, seed=SEED, split=part.split, single=single)
        said = captions(wanted, seed=SEED, style="canonical")
        asked.append(Question(part=name, wanted=wanted, prompts=tuple(said)))
    return asked


class Examiner:
    """Both readers, for square pictures of any size from 32 pixels on."""

    def __init__(self) -> None:
        self.algorithm, self.network = cache(BlockReader), SecondReader()

    def grades(self, question: Question, pictures: Pictures) -> Answer:
        """The answer that pictures, one for each prompt, are."""
        values = stacked(pictures)
        readings = {"algorithm": self.algorithm(values.shape[-1]).read(values), "network": self.network.read(values)}
        return Answer(
            question=question,
            grades={name: grade(read, question.wanted, question.prompts) for name, read in readings.items()},
        )


def stacked(pictures: Pictures) -> Tensor:
    """(N, 3, H, W) in [-1, 1] of pictures of one size."""
    return torch.cat([planes(picture) for picture in pictures]) / 127.5 - 1


def versus(own: Sequence[Answer], base: Sequence[Answer]) -> list[float | None]:
    """For each answer its exactness, the mean of both readers, as a share of the base's; None of nothing."""

    def exact(answer: Answer) -> float:
        return sum(answer.grades[reader].exact for reader in READERS) / len(READERS)

    return [exact(a) / exact(b) if exact(b) else None for a, b in zip(own, base, strict=True)]
