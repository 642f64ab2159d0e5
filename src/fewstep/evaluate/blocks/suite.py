"""The benchmark of block models: prompt following, diversity, FID, and nearest training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from fewstep.blockworld import captions, render, scenes
from fewstep.evaluate.blocks.composition import Answer, Examiner, questions
from fewstep.evaluate.blocks.sheets import exam_sheet, neighbours_sheet
from fewstep.evaluate.candidates import LoadedCandidate
from fewstep.evaluate.image_cache import CachedImages
from fewstep.images import to_pil
from fewstep.metrics.distances import Distances, distances
from fewstep.metrics.diversity import SEEDS, Diversity, diversity
from fewstep.metrics.features import Features
from fewstep.metrics.fid import FEWEST_PICTURES
from fewstep.metrics.neighbours import Neighbours, nearest
from fewstep.metrics.pixels import ImageFiles, Images, image_files

CHUNK = 250  # images rendered at a time
TRAINING_SEED, REAL_SEED, VARIED_SEED = 5_000_000_000, 5_100_000_000, 5_200_000_000
REAL = 200  # fresh images whose neighbours are sought too
PAIRS = 2000  # fresh images with two objects, for FID
SHEET_IMAGES = 20
SHEET_GROUP = "two objects, held out"


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """How many held-out prompts of either kind, prompts with 16 seeds each, and training images to search.

    The training images are `training` new renders of training scenes, or all images in the folder `trained_on`.
    """

    count: int = 1000
    varied: int = 32
    training: int = 5000
    trained_on: Path | None = None


@dataclass(frozen=True, kw_only=True)
class BlockResults:
    """All metrics of one candidate, and two contact sheets.

    `relative_distance`: the distance of its images from the training images as a share of that of new renders.
    `distances`: FID and KID of its images with two objects against renders of other scenes; None for too few images.
    """

    candidate: LoadedCandidate
    image_sets: Sequence[CachedImages]
    answers: list[Answer]
    diversity: Diversity
    neighbours: Neighbours
    relative_distance: float
    distances: Distances | None
    sheets: dict[str, Image.Image]


class BlockBenchmark:
    """What all candidates are measured with: prompts, readers, features, and training images of `side` pixels."""

    def __init__(self, side: int, sizes: SampleSizes, features: Features) -> None:
        self.sizes, self.features = sizes, features
        self.questions, self.examiner = questions(sizes.count), Examiner()
        self.training = _training(sizes, side)
        self.training_features = features.of(self.training)
        real = render_images(REAL, side, seed=REAL_SEED, split="heldout")
        self.real_neighbours = nearest(real, features.of(real), self.training, self.training_features)
        self.real_pair_features = features.of(
            render_images(PAIRS, side, seed=REAL_SEED + 1, split="heldout", single=0.0)
        )

    def measure(self, model: LoadedCandidate) -> BlockResults:
        """Generate all images with `model` and compute their metrics."""
        image_sets = [model.generate(q.prompts, range(len(q.prompts))) for q in self.questions]
        answers = [self.examiner.grades(q, s.images) for q, s in zip(self.questions, image_sets, strict=True)]
        index = next(i for i, question in enumerate(self.questions) if question.group == SHEET_GROUP)
        images, prompts = image_sets[index].images, self.questions[index].prompts
        features = self.features.of(images)
        neighbours = nearest(images, features, self.training, self.training_features)
        return BlockResults(
            candidate=model,
            image_sets=image_sets,
            answers=answers,
            diversity=self._diversity(model),
            neighbours=neighbours,
            relative_distance=neighbours.relative_distance(self.real_neighbours),
            distances=self._distances(features),
            sheets={
                "answers": exam_sheet(answers[index], images, SHEET_IMAGES),
                "neighbours": neighbours_sheet(images, self.training, neighbours.index, prompts),
            },
        )

    def _distances(self, features: Tensor) -> Distances | None:
        if len(features) < FEWEST_PICTURES:
            return None
        return distances(features, self.real_pair_features, str(self.features.network_id))

    def _diversity(self, model: LoadedCandidate) -> Diversity:
        target = scenes(self.sizes.varied, seed=VARIED_SEED, split="heldout")
        prompts = captions(target, seed=VARIED_SEED, style="canonical")
        images = [model.generate([prompt] * SEEDS, range(SEEDS)).images for prompt in prompts]
        return diversity(images, [self.features.of(own) for own in images])


def _training(sizes: SampleSizes, side: int) -> Images:
    if sizes.trained_on is not None:
        return ImageFiles(image_files(sizes.trained_on))
    return render_images(sizes.training, side, seed=TRAINING_SEED, split="train")


def render_images(count: int, side: int, *, seed: int, split: str, single: float = 0.3) -> list[Image.Image]:
    """Renders of new scenes of a split, a share `single` of them with one object; 8 bits, as generated images have."""
    sampled = scenes(count, seed=seed, split=split, single=single)
    parts = (sampled[first : first + CHUNK] for first in range(0, count, CHUNK))
    return [image for part in parts for image in to_pil(render(part, side))]
