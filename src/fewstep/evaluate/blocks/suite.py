"""All that is measured of block models: what their pictures show, how they differ, and whether they are copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fewstep.blockworld import captions, render, scenes
from fewstep.evaluate.blocks.composition import Answer, Examiner, questions
from fewstep.evaluate.blocks.sheets import exam_sheet, neighbours_sheet
from fewstep.evaluate.candidates import Contestant
from fewstep.evaluate.image_cache import Drawn
from fewstep.images import to_pil
from fewstep.metrics.distances import Distances, distances
from fewstep.metrics.diversity import SEEDS, Diversity, diversity
from fewstep.metrics.features import Features
from fewstep.metrics.fid import FEWEST_PICTURES
from fewstep.metrics.neighbours import Neighbours, nearest
from fewstep.metrics.pixels import PictureFiles, Pictures, picture_files

CHUNK = 250  # pictures rendered at a time
TRAINING_SEED, REAL_SEED, VARIED_SEED = 5_000_000_000, 5_100_000_000, 5_200_000_000
REAL = 200  # fresh pictures whose neighbours are sought too
PAIRS = 2000  # fresh pictures with two objects, for FID
SHOWN = 20
SHEET = "two objects, held out"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much: held-out prompts of either kind, prompts drawn with 16 seeds each, training pictures searched.

    These are `training` fresh renders of training scenes, or all pictures in the folder `trained_on`.
    """

    count: int = 1000
    varied: int = 32
    training: int = 5000
    trained_on: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All about one contestant: how it drew, its answers, its diversity, its neighbours, and two sheets to look at.

    `closer`: the distance of its pictures from the training pictures as a share of that of fresh real ones.
    `distances`: those of its pictures with two objects from renders of other scenes of the same kind; None of too few.
    """

    contestant: Contestant
    drawings: Sequence[Drawn]
    answers: list[Answer]
    diversity: Diversity
    neighbours: Neighbours
    closer: float
    distances: Distances | None
    sheets: dict[str, Image.Image]


class Judge:
    """What all models are judged with: questions, readers, features; and training pictures, `side` pixels wide."""

    def __init__(self, side: int, extent: Extent, features: Features) -> None:
        self.extent, self.features = extent, features
        self.questions, self.examiner = questions(extent.count), Examiner()
        self.training = _training(extent, side)
        self.known = features.of(self.training)
        real = rendered(REAL, side, seed=REAL_SEED, split="heldout")
        self.usual = nearest(real, features.of(real), self.training, self.known)
        self.pairs = features.of(rendered(PAIRS, side, seed=REAL_SEED + 1, split="heldout", single=0.0))

    def measure(self, model: Contestant) -> Measured:
        """Draw everything with `model` and judge it."""
        drawings = [model.draw(q.prompts, range(len(q.prompts))) for q in self.questions]
        answers = [self.examiner.grades(q, d.pictures) for q, d in zip(self.questions, drawings, strict=True)]
        shown = next(i for i, question in enumerate(self.questions) if question.part == SHEET)
        pictures, prompts = drawings[shown].pictures, self.questions[shown].prompts
        seen = self.features.of(pictures)
        neighbours = nearest(pictures, seen, self.training, self.known)
        return Measured(
            contestant=model,
            drawings=drawings,
            answers=answers,
            diversity=self._diversity(model),
            neighbours=neighbours,
            closer=neighbours.closer_than(self.usual),
            distances=None if len(seen) < FEWEST_PICTURES else distances(seen, self.pairs, str(self.features.card)),
            sheets={
                "answers": exam_sheet(answers[shown], pictures, SHOWN),
                "neighbours": neighbours_sheet(pictures, self.training, neighbours.index, prompts),
            },
        )

    def _diversity(self, model: Contestant) -> Diversity:
        asked = scenes(self.extent.varied, seed=VARIED_SEED, split="heldout")
        prompts = captions(asked, seed=VARIED_SEED, style="canonical")
        pictures = [model.draw([prompt] * SEEDS, range(SEEDS)).pictures for prompt in prompts]
        return diversity(pictures, [self.features.of(own) for own in pictures])


def _training(extent: Extent, side: int) -> Pictures:
    if extent.trained_on is not None:
        return PictureFiles(picture_files(extent.trained_on))
    return rendered(extent.training, side, seed=TRAINING_SEED, split="train")


def rendered(count: int, side: int, *, seed: int, split: str, single: float = 0.3) -> list[Image.Image]:
    """Pictures of fresh scenes of a split, a share `single` of them with one object, of 8 bits like drawn ones."""
    drawn = scenes(count, seed=seed, split=split, single=single)
    parts = (drawn[first : first + CHUNK] for first in range(0, count, CHUNK))
    return [picture for part in parts for picture in to_pil(render(part, side))]
