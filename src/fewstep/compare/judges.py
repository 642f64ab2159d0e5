"""Models that vote in place of people; their votes are marked as such."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.blockworld import COLOURS, SHAPES, Scenes
from fewstep.blockworld.captions import MIRRORED, OPENINGS, SIZE_WORDS, WORDINGS
from fewstep.blockworld.detector import BlockReader
from fewstep.blockworld.grading import grade
from fewstep.blockworld.scene import ALONE
from fewstep.compare.study import Study
from fewstep.compare.votes import RaterVotes, Vote
from fewstep.engines.cpu.limits import cap_threads
from fewstep.errors import InputError
from fewstep.images import to_tensor

Score = Callable[[Sequence[str], Tensor], Sequence[float]]
"""(prompts, images (B, 3, H, W) in [-1, 1]) -> a score for each, of which the higher is the better."""

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ModelJudge:
    """A model that answers `question` by scores; images with equal scores are a tie."""

    name: str
    question: str
    score: Score


def judge_votes(study: Study, folder: Path, judge: ModelJudge) -> RaterVotes:
    """The votes of `judge` on every pair of the study in `folder` but the attention checks."""
    pairs = [pair for pair in study.pairs if not pair.is_check]
    items = [(pair.prompt, folder / path) for pair in pairs for path in pair.paths]
    scores = _scores(judge.score, items)
    votes = []
    for pair, one, two in zip(pairs, scores[::2], scores[1::2], strict=True):
        votes.append(Vote(pair.id, judge.question, "tie" if one == two else "1" if one > two else "2"))
    return RaterVotes(study=study.digest, rater=judge.name, votes=tuple(votes), judged_by=judge.name)


def _scores(score: Score, items: Sequence[tuple[str, Path]]) -> list[float]:
    """Scores in the order of `items`, prompts with images of one size being judged together."""
    images = [to_tensor(path) for _, path in items]
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_size[tuple(image.shape)].append(index)
    results: dict[int, float] = {}
    for same in by_size.values():
        for start in range(0, len(same), BATCH):
            part = same[start : start + BATCH]
            values = score([items[index][0] for index in part], torch.cat([images[index] for index in part]))
            results |= dict(zip(part, values, strict=True))
    return [results[index] for index in range(len(items))]


def block_reader() -> ModelJudge:
    """The judge of prompt alignment of block images: scores 1 where the algorithmic reader finds the caption right."""

    def score(prompts: Sequence[str], images: Tensor) -> Sequence[float]:
        prompts = [" ".join(prompt.lower().split()) for prompt in prompts]
        target = parse_captions(prompts)
        with cap_threads(1):  # images are small: on a busy machine more threads wait for each other
            readings = BlockReader(images.shape[-1]).read(images)
        return [float(right) for right in grade(readings, target, prompts).images]

    return ModelJudge(name="algorithmic reader", question="alignment", score=score)


JUDGES: Mapping[str, Callable[[], ModelJudge]] = {"reader": block_reader}
"""Judges by the name that `--judge` takes."""

_SIZE, _COLOUR = ("|".join(names) for names in ([w for words in SIZE_WORDS for w in words], COLOURS))
_SOLID = re.compile(rf"an? (?:(?P<size>{_SIZE}) )?(?P<colour>{_COLOUR}) (?P<shape>{'|'.join(SHAPES)})")
_RELATIONS = {text: (relation, False) for relation, texts in WORDINGS.items() for text in texts}
_RELATIONS |= {text: (relation, True) for relation, texts in MIRRORED.items() for text in texts}
_RELATION = re.compile(rf" ({'|'.join(sorted(_RELATIONS, key=len, reverse=True))}) (?=an? )")


def parse_captions(captions: Sequence[str]) -> Scenes:
    """The scenes that lower-case captions of the block world describe, without positions; sizes not stated are 0.

    Raises InputError for other captions.
    """
    count, relations, solids = [], [], []
    for caption in captions:
        body = re.sub(rf"^(?:{'|'.join(OPENINGS)}) ", "", caption)
        first, *rest = _RELATION.split(body, maxsplit=1)
        relation, mirrored = _RELATIONS[rest[0]] if rest else (ALONE, False)
        pair = [_solid(phrase, caption) for phrase in (first, *rest[1:])]
        pair = pair[::-1] if mirrored else pair
        count.append(len(pair))
        relations.append(relation)
        solids.append([*pair, (0, 0, 0)][:2])
    size, colour, shape = torch.tensor(solids).unbind(-1)
    n = len(captions)
    return Scenes(
        count=torch.tensor(count), relation=torch.tensor(relations), size=size, colour=colour, shape=shape,
        position=torch.zeros(n, 2, 3), rotation=torch.zeros(n, 2), backdrop=torch.zeros(n), tone=torch.zeros(n, 3),
    )  # fmt: skip


def _solid(phrase: str, caption: str) -> tuple[int, int, int]:
    match = _SOLID.fullmatch(phrase)
    if match is None:
        example = "a red cube on top of a blue sphere"
        raise InputError(f"the reader judges captions of the block world, as {example!r}, not {caption!r}")
    size = next((i for i, words in enumerate(SIZE_WORDS) if match["size"] in words), 0)
    return size, COLOURS.index(match["colour"]), SHAPES.index(match["shape"])
