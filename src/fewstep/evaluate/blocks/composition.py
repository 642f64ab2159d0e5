"""Prompt following of block models: held-out prompts, and the images graded by two independent readers."""

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
from fewstep.metrics.pixels import Images, image_tensor
from fewstep.tables import Cell

SEED = 2026
READERS = ("algorithm", "network")
GRADE_NAMES = ("exact", "count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind", "direction")


class PromptGroup(NamedTuple):
    """A group of prompts: the split of their scenes, objects per scene, and the number relative to `count`."""

    split: str
    objects: int
    share: float


PROMPT_GROUPS = {
    "one object, held out": PromptGroup("heldout", 1, 1.0),
    "two objects, held out": PromptGroup("heldout", 2, 1.0),
    "one object, colour and shape never together": PromptGroup("unseen_atoms", 1, 0.25),
    "two objects, colour and shape never together": PromptGroup("unseen_atoms", 2, 0.25),
    "one object, trained on": PromptGroup("train", 1, 0.25),
    "two objects, trained on": PromptGroup("train", 2, 0.25),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One group's scenes and their canonical captions as prompts; image i has the seed i."""

    group: str
    target: Scenes
    prompts: tuple[str, ...]

    @property
    def undefined(self) -> frozenset[str]:
        """The grades that its prompts do not define."""
        return frozenset({"relation_kind", "direction"} if PROMPT_GROUPS[self.group].objects == 1 else {"size"})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The grades of one model's images for one question, by reader."""

    question: Question
    grades: dict[str, Grades]

    @property
    def count(self) -> int:
        """How many images there were."""
        return len(self.question.prompts)

    @property
    def agreement(self) -> Interval:
        """The share of images on which both readers give the same verdict, with its interval."""
        a, b = (self.grades[reader].images for reader in READERS)
        return share_interval(sum(x == y for x, y in zip(a, b, strict=True)) / self.count, self.count)

    def exact(self, reader: str) -> Interval:
        """The share of images that a reader finds right in every respect, with its interval."""
        return share_interval(self.grades[reader].exact, self.count)

    def rows(self, model: str) -> list[dict[str, Cell]]:
        """One table row for each reader."""
        return [self._row(model, reader) for reader in READERS]

    def _row(self, model: str, reader: str) -> dict[str, Cell]:
        exact, undefined = self.exact(reader), self.question.undefined
        grades = {name: None if name in undefined else getattr(self.grades[reader], name) for name in GRADE_NAMES}
        return {
            "model": model,
            "prompts": self.question.group,
            "reader": reader,
            "n": self.count,
            **grades,
            "exact_low": exact.low,
            "exact_high": exact.high,
            "readers_agree": self.agreement.value,
        }


def questions(count: int) -> list[Question]:
    """`count` held-out prompts with one object and as many with two, and a quarter of that of each other group."""
    if count < 1:
        raise InputError(f"an exam of {count} prompts says nothing; ask for at least 1, and for 1000 to be sure")
    exam = []
    for name, group in PROMPT_GROUPS.items():
        single, number = float(group.objects == 1), max(1, round(count * group.share))
        target = scenes(number, seed=SEED, split=group.split, single=single)
        prompts = captions(target, seed=SEED, style="canonical")
        exam.append(Question(group=name, target=target, prompts=tuple(prompts)))
    return exam


class Examiner:
    """Grades images by both readers; square images of any size from 32 pixels on."""

    def __init__(self) -> None:
        self.algorithm, self.network = cache(BlockReader), SecondReader()

    def grades(self, question: Question, images: Images) -> Answer:
        """The grades of `images`, one for each prompt of `question`."""
        values = image_batch(images)
        readings = {"algorithm": self.algorithm(values.shape[-1]).read(values), "network": self.network.read(values)}
        return Answer(
            question=question,
            grades={name: grade(reading, question.target, question.prompts) for name, reading in readings.items()},
        )


def image_batch(images: Images) -> Tensor:
    """(N, 3, H, W) in [-1, 1] of images of one size."""
    return torch.cat([image_tensor(image) for image in images]) / 127.5 - 1


def relative_accuracy(own: Sequence[Answer], base: Sequence[Answer]) -> list[float | None]:
    """For each answer the share of exact images (mean of both readers) over that of the base; None where that is 0."""

    def exact(answer: Answer) -> float:
        return sum(answer.grades[reader].exact for reader in READERS) / len(READERS)

    return [exact(a) / exact(b) if exact(b) else None for a, b in zip(own, base, strict=True)]
