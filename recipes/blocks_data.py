"""What blocks-base is trained on: pictures, captions as ids, slots, and the latents kept on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.blockworld import COLOURS, SHAPES, Scenes, captions, render, require_train, scenes, vocabulary
from fewstep.errors import InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer, word_tokenizer

SMALL, SIZE = 64, 128  # sides of the pictures of the first stages and of the last
WINDOW = 24
CHUNK = 8192
UNKNOWN, FIRST_WORD = 3, 4  # ids of `word_tokenizer`
VARIED = 5  # varied captions a scene, beside the canonical one


def block_tokenizer() -> Tokenizer:
    """The words of blockworld, in a window of 24."""
    return word_tokenizer(vocabulary(), WINDOW)


class PicturePool:
    """Rendered training pictures (uint8), a part of which is drawn anew every `refresh_steps` steps."""

    def __init__(self, count: int, size: int, *, seed: int, refresh: int = 256, refresh_steps: int = 100) -> None:
        self.size, self.seed, self.refresh, self.refresh_steps = size, seed, refresh, refresh_steps
        self.pictures = self._rendered(count, 0)

    def batch(self, count: int, step: int) -> Tensor:
        """(count, 3, size, size) in [-1, 1], colour channels permuted in half of the batches.

        The permutation keeps unseen pairs of colour and shape within the autoencoder's reach.
        """
        if step % self.refresh_steps == 0:
            places = torch.randperm(len(self.pictures))[: self.refresh]
            self.pictures[places] = self._rendered(self.refresh, step + 1)
        image = self.pictures[torch.randint(len(self.pictures), (count,))].float() / 127.5 - 1
        if torch.rand(()) < 0.5:
            image = image[:, torch.randperm(3)]
        return image.contiguous(memory_format=torch.channels_last)

    def _rendered(self, count: int, step: int) -> Tensor:
        drawn = scenes(count, seed=self.seed + step * 1009)
        require_train(drawn)
        return ((render(drawn, self.size) + 1) * 127.5).round().byte()


def scene_slots(drawn: Scenes) -> Tensor:
    """(B, 7) int64: colour, shape, size of object 0, of object 1 (-100 where absent), then the relation."""
    slots = torch.stack([drawn.colour, drawn.shape, drawn.size], dim=2)
    slots[drawn.count == 1, 1] = -100
    return torch.cat([slots.flatten(1), drawn.relation[:, None]], dim=1)


def blank_words(ids: Tensor, slots: Tensor, share: float) -> None:
    """Make all colours in a `share` of captions unknown words, in place, and all shapes in as many; and their slots.

    A colour and a shape are often trained on at one size only. Without this the size would be told from them, and the
    word for it not be heard.
    """
    known = vocabulary()
    for words, places in ((COLOURS, (0, 3)), (SHAPES, (1, 4))):
        chosen = torch.rand(len(ids)) < share
        named = torch.isin(ids, torch.tensor([FIRST_WORD + known.index(word) for word in words]))
        ids[chosen[:, None] & named] = UNKNOWN
        slots[chosen[:, None] & torch.isin(torch.arange(slots.shape[1]), torch.tensor(places))] = -100


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
            raise InputError(f"{folder} holds no latents; run the stage `latents` first")
        return cls(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in ("latents", "ids", "slots")})

    def batch(self, count: int, varied: float) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, ids (count, 24) int64 and slots of random scenes; a share `varied` of varied captions."""
        index = torch.randint(len(self.latents), (count,))
        which = torch.randint(1, 1 + VARIED, (count,)) * (torch.rand(count) < varied)
        return self.latents[index], self.ids[index, which].long(), self.slots[index]


def write_chunk(model: AutoencoderKL, folder: Path, number: int, size: int) -> None:
    """Encode 512 KiB of latents a channel: `CHUNK` scenes at 64 pixels, a quarter at 128; once."""
    path = folder / f"chunk-{number:03d}.pt"
    if path.exists():
        return
    count = CHUNK * SMALL**2 // size**2
    drawn = scenes(count, seed=5_000_000 + number, single=0.35)
    require_train(drawn)
    with torch.inference_mode():
        means = [model.encode(render(drawn[i : i + 64], size)).chunk(2, dim=1)[0] for i in range(0, count, 64)]
    ids = caption_ids(drawn, number, block_tokenizer())
    chunk = {"latents": torch.cat(means).contiguous(), "ids": ids, "slots": scene_slots(drawn)}
    partial_path = path.with_suffix(".partial")
    torch.save(chunk, partial_path)
    partial_path.replace(path)
