"""What networks make of prepared pictures and captions, kept on the disk: moments of latents, states of texts.

A cache is a folder of safetensors files, each with the results of up to `CHUNK` pictures of one bucket. Every file
says which weights, which transform and which data it was made with, and carries its own checksum: one that is stale
or damaged is refused.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.data.shards import Indices, Shards, stacked_images
from fewstep.errors import CheckpointError, InputError, NotFiniteError, printable, quoted
from fewstep.files import atomic_write, read_json, write_json

CHUNK = 1024  # part of the format: another number would misplace the rows of caches that are there
MOST_OPEN = 256  # chunks mapped at once; systems allow some 65,000 mappings
NOTE = "fewstep_cache"

Tensors = Mapping[str, Tensor]
Encode = Callable[[Indices], Tensors]


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What decides the contents of a cache: a digest of the weights, the transform in words, a digest of the data."""

    weights: str
    transform: str
    data: str


class Span(NamedTuple):
    """The pictures of one file of a cache, all of one bucket."""

    name: str
    indices: Indices


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A finished cache; `open_cache` makes one. Files are mapped into memory, and checked when first opened."""

    folder: Path
    key: CacheKey
    spans: Sequence[Span]
    places: Indices
    opened: OrderedDict[int, Tensors] = field(default_factory=OrderedDict, repr=False)
    checked: set[int] = field(default_factory=set, repr=False)

    def read(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The tensors of these pictures, a row each in this order; the pictures must be of one bucket.

        Raises `CheckpointError`, naming the file, if it is gone, damaged or made with something else.
        """
        rows: dict[str, list[Tensor]] = {}
        for i in indices:
            if not 0 <= i < len(self.places):
                raise InputError(f"there is no picture {i}; {self.folder} holds 0 to {len(self.places) - 1}")
            span, row = divmod(int(self.places[i]), CHUNK)
            for name, tensor in self._chunk(span).items():
                rows.setdefault(name, []).append(tensor[row])
        try:
            return {name: torch.stack(each) for name, each in rows.items()}
        except RuntimeError as error:
            raise InputError(
                f"the pictures {list(indices)[:8]} are not of one bucket, whose latents have one size"
            ) from error

    def _chunk(self, number: int) -> Tensors:
        if number not in self.opened:
            span = self.spans[number]
            tensors = read_chunk(self.folder / span.name, self.key, check=number not in self.checked)
            if any(tensor.shape[:1] != span.indices.shape for tensor in tensors.values()):
                raise CheckpointError(f"{self.folder / span.name} has not a row for each picture; {_MEND}")
            self.opened[number] = tensors
            self.checked.add(number)
            if len(self.opened) > MOST_OPEN:
                self.opened.popitem(last=False)
        self.opened.move_to_end(number)
        return self.opened[number]


def cache_key(shards: Shards, weights: Tensors, transform: str) -> CacheKey:
    """The key of what the network with these `weights`, used as `transform` says, makes of `shards`."""
    return CacheKey(weights=weights_digest(weights), transform=transform, data=shards.manifest.digest)


def latent_key(shards: Shards, autoencoder: Tensors, scaling_factor: float, dtype: torch.dtype) -> CacheKey:
    """The key of the latents that an autoencoder of these weights makes, stored as `dtype`."""
    return cache_key(shards, autoencoder, f"mean and std of latents x {scaling_factor}, {dtype}")


def text_key(shards: Shards, towers: Iterable[Tensors], dtype: torch.dtype) -> CacheKey:
    """The key of the text states that towers of these weights make of captions in one window, stored as `dtype`."""
    weights = {f"{i}.{name}": tensor for i, tower in enumerate(towers) for name, tensor in tower.items()}
    return cache_key(shards, weights, f"text states in one window, {dtype}")


def weights_digest(weights: Tensors) -> str:
    """64 hex digits over the names, formats, shapes and bytes of tensors, in the order of their names."""
    digest = sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def latent_encoder(shards: Shards, encode: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype) -> Encode:
    """What fills a latent cache: `mean` and `std` (B, 4, h, w) of the scaled latents, by an engine's `encode`."""

    def moments(indices: Indices) -> Tensors:
        mean, std = encode(stacked_images(shards.read(indices)))
        return {"mean": mean.to("cpu", dtype), "std": std.to("cpu", dtype)}

    return moments


def text_encoder(
    shards: Shards, encode: Callable[[list[str]], tuple[Tensor, Tensor | None]], dtype: torch.dtype
) -> Encode:
    """What fills a text cache: `context` (B, M, D) and, for SDXL, `pooled` (B, P) of the captions."""

    def states(indices: Indices) -> Tensors:
        context, pooled = encode(shards.captions(indices))
        found = {"context": context} if pooled is None else {"context": context, "pooled": pooled}
        return {name: tensor.to("cpu", dtype) for name, tensor in found.items()}

    return states


def write_cache(
    folder: str | Path,
    shards: Shards,
    encode: Encode,
    key: CacheKey,
    *,
    batch: int = 16,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, int]]:
    """Fill a cache, and tell after each file how many are done and how many there are.

    Files that are there and whole stay, so a run that was interrupted goes on. `batch` pictures are encoded at once;
    rank r of n writes its part with `share` = (r, n). `CheckpointError` if the folder is the cache of something else,
    `NotFiniteError` if the network gives NaN or infinity.
    """
    if batch < 1 or not 0 <= share[0] < share[1]:
        raise InputError(
            f"batch {batch}, share {share}: a batch has 1 picture or more, a share is (r, n) with 0 <= r < n"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "cache.json"
    if note.exists():
        _require_same(folder, read_json(note), key)
    else:
        write_json(note, asdict(key))
    spans = _spans(shards)[share[0] :: share[1]]
    for done, span in enumerate(spans, 1):
        if not _is_whole(folder / span.name, key):
            _write_chunk(folder / span.name, _encoded(encode, span, batch), key)
        yield done, len(spans)


def open_cache(folder: str | Path, shards: Shards, key: CacheKey) -> Cache:
    """The cache in `folder`; `CheckpointError` if it was made with something else than `key`, or is not finished."""
    folder, spans = Path(folder), _spans(shards)
    if not (folder / "cache.json").is_file():
        raise InputError(f"{folder} is no cache; make it with `fewstep data cache`")
    _require_same(folder, read_json(folder / "cache.json"), key)
    missing = [span.name for span in spans if not (folder / span.name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(spans)} files ({missing[0]} first); "
            "give the command again that made it: it writes only these"
        )
    places = np.empty(len(shards), np.int64)
    for number, span in enumerate(spans):
        places[span.indices] = number * CHUNK + np.arange(len(span.indices))
    return Cache(folder=folder, key=key, spans=spans, places=places)


def read_chunk(path: Path, key: CacheKey, *, check: bool = True) -> Tensors:
    """The tensors of one file of a cache, mapped into memory; with `check` its bytes are summed up first.

    `CheckpointError` says what is wrong with it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get(NOTE, "{}"))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({printable(str(error))}); {_MEND}") from error
    note = note if isinstance(note, dict) else {}
    _require_same(path, note.get("key"), key)
    if check and note.get("sha256") != weights_digest(tensors):
        raise CheckpointError(f"{path} is damaged: its checksum is not what it says; {_MEND}")
    return tensors


_MEND = "give the command again that made the cache: it writes the bad file anew"


def _spans(shards: Shards) -> list[Span]:
    """The files of a cache: the pictures of each bucket in their order, `CHUNK` at a time."""
    members = [np.flatnonzero(shards.buckets == bucket) for bucket in range(len(shards.manifest.buckets))]
    parts = [each[start : start + CHUNK] for each in members for start in range(0, len(each), CHUNK)]
    return [Span(f"chunk-{number:06d}.safetensors", part) for number, part in enumerate(parts)]


def _require_same(path: Path, found: object, key: CacheKey) -> None:
    values = found if isinstance(found, dict) else {}
    for name, value in asdict(key).items():
        if values.get(name) != value:
            raise CheckpointError(
                f"{path} was made with other {name} ({quoted(values.get(name), 40)}, not {value[:40]}), so it does not "
                "fit; delete it, or name another folder"
            )


def _is_whole(path: Path, key: CacheKey) -> bool:
    try:
        return path.is_file() and bool(read_chunk(path, key))
    except CheckpointError:
        return False


def _encoded(encode: Encode, span: Span, batch: int) -> dict[str, Tensor]:
    parts = [encode(span.indices[start : start + batch]) for start in range(0, len(span.indices), batch)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, tensor in whole.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFiniteError(f"{name} of the pictures for {span.name} holds NaN or infinity; encode in float32")
    return whole


def _write_chunk(path: Path, tensors: Mapping[str, Tensor], key: CacheKey) -> None:
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    note = json.dumps({"key": asdict(key), "sha256": weights_digest(ready)})
    with atomic_write(path) as file:
        file.write(save(ready, metadata={NOTE: note}))
