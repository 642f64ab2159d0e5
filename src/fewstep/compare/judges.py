"""Models that vote in place of people, and say so in whatever they vote on."""

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
from fewstep.compare.votes import Ballot, Vote
from fewstep.errors import InputError
from fewstep.images import to_tensor

Score = Callable[[Sequence[str], Tensor], Sequence[float]]
"""(prompts, images (B, 3, H, W) in [-1, 1]) -> a score for each, of which the higher is the better."""

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A model that answers `question` by scores; pictures with equal scores are a tie."""

    name: str
    question: str
    score: Score


def judged(study: Study, folder: Path, judge: Judge) -> Ballot:
    """The votes of `judge` on every pair of the study in `folder` but the attention checks."""
    pairs = [pair for pair in study.pairs if not pair.is_check]
    asked = [(pair.prompt, folder / path) for pair in pairs for path in pair.paths]
    scores = _scores(judge.score, asked)
    votes = []
    for pair, one, two in zip(pairs, scores[::2], scores[1::2], strict=True):
        votes.append(Vote(pair.id, judge.question, "tie" if one == two else "1" if one > two else "2"))
    return Ballot(study=study.digest, rater=judge.name, votes=tuple(votes), judged_by=judge.name)


def _scores(score: Score, asked: Sequence[tuple[str, Path]]) -> list[float]:
    """Scores in the order of `asked`, prompts with pictures of one size being judged together."""
    images = [to_tensor(path) for _, path in asked]
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_size[tuple(image.shape)].append(index)
    found: dict[int, float] = {}
    for same in by_size.values():
        for start in range(0, len(same), BATCH):
            part = same[start : start + BATCH]
            values = score([asked[index][0] for index in part], torch.cat([images[index] for index in part]))
            found |= dict(zip(part, values, strict=True))
    return [found[index] for index in range(len(asked))]


def block_reader() -> Judge:
    """Prompt alignment in the block world: 1 where the algorithmic reader sees what the prompt says, else 0."""

    def score(prompts: Sequence[str], images: Tensor) -> Sequence[float]:
        prompts = [" ".join(prompt.lower().split()) for prompt in prompts]
        wanted = scenes_said(prompts)
        return [float(right) for right in grade(BlockReader(images.shape[-1]).read(images), wanted, prompts).images]

    return Judge(name="algorithmic reader", question="alignment", score=score)


JUDGES: Mapping[str, Callable[[], Judge]] = {"reader": block_reader}
"""Judges by the name that `--judge` takes."""

_SIZE, _COLOUR = ("|".join(names) for names in ([w for words in SIZE_WORDS for w in words], COLOURS))
_SOLID = re.compile(rf"an? (?:(?P<size>{_SIZE}) )?(?P<colour>{_COLOUR}) (?P<shape>{'|'.join(SHAPES)})")
_SAID = {said: (relation, False) for relation, texts in WORDINGS.items() for said in texts}
_SAID |= {said: (relation, True) for relation, texts in MIRRORED.items() for said in texts}
_RELATION = re.compile(rf" ({'|'.join(sorted(_SAID, key=len, reverse=True))}) (?=an? )")


def scenes_said(captions: Sequence[str]) -> Scenes:
    """The scenes that lower-case captions of the block world say, without positions; sizes not said are 0.

    Raises InputError for other captions.
    """
    count, relations, solids = [], [], []
    for caption in captions:
        body = re.sub(rf"^(?:{'|'.join(OPENINGS)}) ", "", caption)
        first, *rest = _RELATION.split(body, maxsplit=1)
        relation, mirrored = _SAID[rest[0]] if rest else (ALONE, False)
        found = [_solid(phrase, caption) for phrase in (first, *rest[1:])]
        found = found[::-1] if mirrored else found
        count.append(len(found))
        relations.append(relation)
        solids.append([*found, (0, 0, 0)][:2])
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
