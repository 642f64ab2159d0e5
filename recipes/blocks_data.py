"""What the blocks models are trained on: pictures, captions, slots, and latents that are kept on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.blockworld import COLOURS, SHAPES, Scenes, captions, render, require_train, scenes, vocabulary
from fewstep.errors import InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer, word_tokenizer
from fewstep.train.plan import Part, mixed_seed
from fewstep.train.ranks import join_ranks, meet_ranks
from fewstep.train.sources import Blockworld, Examples

SMALL, SIZE = 64, 128  # sides of the pictures of the first stages and of the last
WINDOW = 24
CHUNK = 8192
UNKNOWN, FIRST_WORD = 3, 4  # ids of `word_tokenizer`
VARIED = 5  # varied captions a scene, beside the canonical one


def block_tokenizer() -> Tokenizer:
    """The words of blockworld, in a window of 24."""
    return word_tokenizer(vocabulary(), WINDOW)


def permuted_pictures(part: Part, size: int) -> Tensor:
    """(count, 3, size, size) in [-1, 1], colour channels permuted in half of the batches.

    The permutation keeps unseen pairs of colour and shape within the autoencoder's reach.
    """
    pictures = Blockworld(size=size).examples(part).pictures
    assert pictures is not None
    generator = part.generator("channels")
    if torch.rand((), generator=generator) < 0.5:
        pictures = pictures[:, torch.randperm(3, generator=generator)]
    return pictures.contiguous(memory_format=torch.channels_last)


def scene_slots(drawn: Scenes) -> Tensor:
    """(B, 7) int64: colour, shape, size of object 0, of object 1 (-100 where absent), then the relation."""
    slots = torch.stack([drawn.colour, drawn.shape, drawn.size], dim=2)
    slots[drawn.count == 1, 1] = -100
    return torch.cat([slots.flatten(1), drawn.relation[:, None]], dim=1)


def blank_words(ids: Tensor, slots: Tensor, chances: Tensor, share: float) -> None:
    """Make all colours in a `share` of captions unknown words, in place, and all shapes in as many; and their slots.

    A colour and a shape are often trained on at one size only. Without this the size would be told from them, and the
    word for it not be heard. `chances` (B, 2) in [0, 1).
    """
    known = vocabulary()
    for chance, words, places in zip(chances.T, (COLOURS, SHAPES), ((0, 3), (1, 4)), strict=True):
        chosen = (chance < share)[:, None]
        named = torch.isin(ids, torch.tensor([FIRST_WORD + known.index(word) for word in words]))
        ids[chosen & named] = UNKNOWN
        slots[chosen & torch.isin(torch.arange(slots.shape[1]), torch.tensor(places))] = -100


def caption_ids(drawn: Scenes, seed: int, tokenizer: Tokenizer) -> Tensor:
    """(B, 1 + VARIED, 24) uint8: the canonical caption, then varied ones."""
    said = [captions(drawn, seed=seed, style="canonical")]
    said += [captions(drawn, seed=seed * 64 + i, style="varied") for i in range(1, VARIED + 1)]
    return torch.stack([tokenize(texts, tokenizer).ids[:, 0] for texts in said], dim=1).byte()


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Encoded scenes: latents (N, 4, h, w), caption ids (N, 1 + VARIED, 24) uint8, slots (N, 7)."""

    latents: Tensor
    ids: Tensor
    slots: Tensor

    @classmethod
    def read(cls, folder: Path) -> LatentCache:
        """All chunks in `folder`."""
        chunks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("chunk-*.pt"))]
        if not chunks:
            raise InputError(f"{folder} holds no latents; a stage of blocks_base.py writes them")
        return cls(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in ("latents", "ids", "slots")})

    def rows(self, part: Part, varied: float) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, ids (count, 24) int64 and slots of random scenes; a share `varied` of varied captions."""
        index = part.randint("scene", len(self.latents))
        which = (1 + part.randint("caption", VARIED)) * (part.rand("varied") < varied)
        return self.latents[index], self.ids[index, which].long(), self.slots[index]


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A source of cached latents with their captions."""

    folder: Path
    varied: float = 0.7

    def examples(self, part: Part) -> Examples:
        """See `fewstep.train.sources.Source`."""
        latents, ids, _ = read_once(self.folder).rows(part, self.varied)
        return Examples(captions=[said(row) for row in ids.tolist()], latents=latents)


read_once = cache(LatentCache.read)


def said(ids: Sequence[int]) -> str:
    """The words of a caption's ids."""
    known = vocabulary()
    return " ".join(known[i - FIRST_WORD] for i in ids if i >= FIRST_WORD)


def write_latents(model: AutoencoderKL, folder: Path, chunks: int, size: int) -> None:
    """Encode `chunks` chunks of scenes, each rank its share; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = join_ranks()
    for number in range(rank, chunks, ranks):
        _write_chunk(model, folder / f"chunk-{number:03d}.pt", number, size)
    meet_ranks()


def _write_chunk(model: AutoencoderKL, path: Path, number: int, size: int) -> None:
    """512 KiB of latents a channel: `CHUNK` scenes at 64 pixels, a quarter at 128."""
    if path.exists():
        return
    count = CHUNK * SMALL**2 // size**2
    drawn = scenes(count, seed=mixed_seed("latents", number), single=0.35)
    require_train(drawn)
    with torch.inference_mode():
        means = [model.encode(render(drawn[i : i + 64], size)).chunk(2, dim=1)[0] for i in range(0, count, 64)]
    ids = caption_ids(drawn, number, block_tokenizer())
    chunk = {"latents": torch.cat(means).contiguous(), "ids": ids, "slots": scene_slots(drawn)}
    partial_path = path.with_suffix(".partial")
    torch.save(chunk, partial_path)
    partial_path.replace(path)
