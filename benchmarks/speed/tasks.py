"""The tasks that are measured, and their inputs as NumPy arrays, so that no runner needs PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PARTS = ("whole", "decode", "encode", "unet")
STAGES = ("text", "unet", "decode")
WINDOW = 77
PAD, BOS, EOS, WORD = 0, 1, 2, 4
"""Ids of a vocabulary that knows one word, so that no runner needs the tokenizer."""


class Piece(NamedTuple):
    """One network of a task: "text", "unet", "decode" or "encode", called with so many rows."""

    kind: str
    rows: int


class NoiseLevels(NamedTuple):
    """The noise levels of a run, falling to 0, the time step of each but the last, and the scale of the first noise."""

    sigmas: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    scale: float = 1.0


class RunOutput(NamedTuple):
    """The output of a run, and the seconds of its stages where it has some."""

    output: Any
    stages: Mapping[str, float] = {}


Run = Callable[[], RunOutput]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A part of the model in `folder`, for `batch` images of `size` pixels, with `threads` on `device`.

    `part`: one of `PARTS`. The whole takes a prompt through `steps` of `sampler` ("euler" or "dpmpp_2m") along `levels`
    of `schedule`. `decoder`: the folder of a tiny decoder to take the autoencoder's place.
    `made`: the folders are read by those alone who must; the others make the same weights on the device. `images`:
    fewstep's whole is a call of its pipeline from prompt to PIL images, by the model's own sampler.
    """

    model: str
    folder: Path
    part: str = "whole"
    size: int = 512
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    steps: int = 1
    guidance: float = 0.0
    sampler: str = "euler"
    schedule: str = "trailing"
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    decoder: Path | None = None
    made: bool = False
    images: bool = False

    @property
    def guided(self) -> bool:
        """Whether each step predicts twice, with the prompt and without."""
        return self.guidance > 1

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The networks it needs."""
        if self.part != "whole":
            return (Piece(self.part, self.batch),)
        rows = 2 if self.guided else 1
        return Piece("text", rows), Piece("unet", rows * self.batch), Piece("decode", self.batch)

    @property
    def scaling(self) -> float:
        """What latents are divided by before they are decoded."""
        return 1.0 if self.decoder else float(_config(self, "vae").get("scaling_factor", 0.18215))

    def place(self, peer: str, piece: Piece) -> Path:
        """The folder in which `peer` keeps a network in a form of its own."""
        tiny = "-tiny" if piece.kind == "decode" and self.decoder else ""
        return self.folder / peer / f"{piece.kind}{tiny}-{self.size}-{piece.rows}-{self.dtype}"


def inputs(task: Task, piece: Piece) -> tuple[Any, ...]:
    """What a network is called with, the same in every process.

    text: ids (B, 77). decode: latents (B, 4, h, w) as the autoencoder has them. encode: image (B, 3, H, W). unet:
    latents, times (B), text states (B, 77, D), and for SDXL pooled text (B, P) and sizes (B, 6).
    """
    random, side = np.random.default_rng(0), task.size // 8

    def normal(*shape: int) -> Any:
        return random.standard_normal((piece.rows, *shape), dtype=np.float32)

    if piece.kind == "text":
        return (token_ids(prompt(0), guided=piece.rows == 2),)
    if piece.kind == "decode":
        return (normal(4, side, side),)
    if piece.kind == "encode":
        return (normal(3, task.size, task.size).clip(-1, 1),)
    config = _config(task, "unet")
    times = np.full(piece.rows, 999.0, dtype=np.float32)
    inputs = (normal(4, side, side), times, normal(WINDOW, config["cross_attention_dim"]))
    addition = config.get("projection_class_embeddings_input_dim")
    if not addition:
        return inputs
    sizes = np.tile(np.array([[task.size, task.size, 0, 0, task.size, task.size]], dtype=np.float32), (piece.rows, 1))
    return (*inputs, normal(addition - 6 * 256), sizes)


def prompt(run: int) -> str:
    """A prompt that differs in each run, so that caches of text encodings do not count."""
    return " ".join(["a"] * (1 + run % (WINDOW - 2)))


def token_ids(text: str, *, guided: bool) -> Any:
    """Ids (1, 77) int64 of a text, or (2, 77) with those of an empty one before."""
    tokens = [BOS, *[WORD] * len(text.split()), EOS]
    rows = [[BOS, EOS], tokens] if guided else [tokens]
    return np.array([row + [PAD] * (WINDOW - len(row)) for row in rows], dtype=np.int64)


def noise(task: Task) -> Any:
    """Unit noise (B, 4, h, w) that a whole run starts from."""
    shape = task.batch, 4, task.size // 8, task.size // 8
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def _config(task: Task, part: str) -> dict[str, Any]:
    """The config.json of the "unet" or the "vae"."""
    if not task.made:
        path = task.folder / part / "config.json"
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    from fewstep.models.zoo import entry

    known = entry(task.model)
    network = known.unet if part == "unet" else known.autoencoder
    assert network is not None
    return network.to_diffusers(task.size)
