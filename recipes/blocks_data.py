"""What the blocks models are trained on: pictures, captions, slots, and latents that are kept on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from fewstep.blockworld import COLOURS, SHAPES, Scenes, captions, render, require_train, scenes, vocabulary
from fewstep.errors import InputError
from fewstep.files import partial_path
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer, word_tokenizer
from fewstep.train.datasets import CaptionedBatch
from fewstep.train.distributed import barrier, init_ranks
from fewstep.train.plan import MicroBatch, mixed_seed

SMALL, SIZE = 64, 128  # sides of the pictures of the first stages and of the last
WINDOW = 24
CHUNK = 8192
UNKNOWN, FIRST_WORD = 3, 4  # ids of `word_tokenizer`
VARIED = 5  # varied captions a scene, beside the canonical one
ENCODED, CARD_ENCODED = 64, 512  # pictures encoded at once


def block_tokenizer() -> Tokenizer:
    """The words of blockworld, in a window of 24."""
    return word_tokenizer(vocabulary(), WINDOW)


def permuted_pictures(micro_batch: MicroBatch, size: int) -> Tensor:
    """(count, 3, size, size) in [-1, 1] on the part's device, colour channels permuted in half of the batches.

    The permutation keeps unseen pairs of colour and shape within the autoencoder's reach. Scenes are drawn on the CPU
    and rendered where the part is.
    """
    read = dict(micro_batch.inputs(_permuted_scenes))
    channels = read.pop("channels")
    with torch.no_grad(), torch.autocast(micro_batch.device.type, enabled=False):
        pictures = render(Scenes(**read), size).index_select(1, channels)
    return pictures.contiguous(memory_format=layout_on(micro_batch.device))


def layout_on(device: torch.device) -> torch.memory_format:
    """How convolutions are fastest there: PyTorch's group norm knows channels last on a CPU alone."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def _permuted_scenes(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
    """The part's scenes by their fields, and the "channels" (3,)."""
    drawn = scenes(micro_batch.whole, seed=mixed_seed(micro_batch.seed, micro_batch.step, "scenes"), single=0.35)
    require_train(drawn)
    generator = micro_batch.generator("channels")
    permuted = torch.rand((), generator=generator) < 0.5
    channels = torch.randperm(3, generator=generator) if permuted else torch.arange(3)
    return drawn[micro_batch.first : micro_batch.first + micro_batch.count].tensors() | {"channels": channels}


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
        ids.masked_fill_(chosen & named, UNKNOWN)
        slots.masked_fill_(chosen & torch.isin(torch.arange(slots.shape[1]), torch.tensor(places)), -100)


def caption_ids(drawn: Scenes, seed: int, tokenizer: Tokenizer) -> Tensor:
    """(B, 1 + VARIED, 24) uint8: the canonical caption, then varied ones."""
    styles = [captions(drawn, seed=seed, style="canonical")]
    styles += [captions(drawn, seed=seed * 64 + i, style="varied") for i in range(1, VARIED + 1)]
    return torch.stack([tokenize(texts, tokenizer).ids[:, 0] for texts in styles], dim=1).byte()


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

    def words(self, micro_batch: MicroBatch, varied: float) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of random scenes, their ids (count, 24) int64 and slots; a share `varied` of varied captions."""
        index = micro_batch.randint("scene", len(self.latents))
        which = (1 + micro_batch.randint("caption", VARIED)) * (micro_batch.rand("varied") < varied)
        return index, self.ids[index, which].long(), self.slots[index]


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A source of cached latents with their captions."""

    folder: Path
    varied: float = 0.7

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `fewstep.train.datasets.Source`."""
        cached = read_once(self.folder)
        index, ids, _ = cached.words(micro_batch, self.varied)
        return CaptionedBatch(captions=[caption_of(row) for row in ids.tolist()], latents=cached.latents[index])


read_once = cache(LatentCache.read)


def caption_of(ids: Sequence[int]) -> str:
    """The words of a caption's ids."""
    known = vocabulary()
    return " ".join(known[i - FIRST_WORD] for i in ids if i >= FIRST_WORD)


def write_latents(model: AutoencoderKL, folder: Path, chunks: int, size: int) -> None:
    """Encode `chunks` chunks of scenes where the model is, each rank its share; those that are there stay.

    Beside a card, which encodes a chunk in a tenth of the time, the captions are made by a process for each core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = init_ranks()
    paths = {number: folder / f"chunk-{number:03d}.pt" for number in range(rank, chunks, ranks)}
    missing = {number: path for number, path in paths.items() if not path.exists()}
    count = CHUNK * SMALL**2 // size**2
    alone = next(model.parameters()).device.type == "cpu" or len(missing) < 8
    cores = min(os.cpu_count() or 1, len(missing))
    crew = nullcontext() if alone else ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,))
    with crew as pool:
        encoded = _captions(missing, count, pool)
        for (number, path), (ids, slots) in zip(missing.items(), encoded, strict=True):
            torch_save({"latents": _encoded(model, number, count, size), "ids": ids, "slots": slots}, path)
    barrier()


def _captions(numbers: Iterable[int], count: int, pool: Executor | None) -> Iterable[tuple[Tensor, Tensor]]:
    """The caption ids and slots of each chunk of `count` scenes."""
    job = partial(_chunk_captions, count=count)
    return map(job, numbers) if pool is None else pool.map(job, numbers)


def _chunk_captions(number: int, count: int) -> tuple[Tensor, Tensor]:
    drawn = _chunk_scenes(number, count)
    require_train(drawn)
    return caption_ids(drawn, number, block_tokenizer()), scene_slots(drawn)


def _chunk_scenes(number: int, count: int) -> Scenes:
    return scenes(count, seed=mixed_seed("latents", number), single=0.35)


@torch.inference_mode()
def _encoded(model: AutoencoderKL, number: int, count: int, size: int) -> Tensor:
    """The latents of a chunk: 512 KiB a channel, of `CHUNK` scenes at 64 pixels, a quarter at 128."""
    device = next(model.parameters()).device
    drawn = Scenes(**{name: value.to(device) for name, value in _chunk_scenes(number, count).tensors().items()})
    step = ENCODED if device.type == "cpu" else CARD_ENCODED
    mean = [model.encode(render(drawn[i : i + step], size)).chunk(2, dim=1)[0] for i in range(0, count, step)]
    return torch.cat(mean).contiguous().cpu()


def torch_save(values: Mapping[str, Tensor], path: Path) -> None:
    """Write a file that appears whole or not at all."""
    with partial_path(path) as partial:
        torch.save(values, partial)
