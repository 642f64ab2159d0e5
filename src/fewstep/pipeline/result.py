"""What a task gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Result:
    """Pictures and how they came about; one entry a picture in every tuple.

    `images`: PIL pictures, empty for other outputs. `array` (B, H, W, 3) in 0..1 with `output="numpy"`. `latents`
    (B, 4, h, w), scaled, with `output="latent"`. `tokens_used` and `tokens_dropped` count those of the prompt, without
    start, end and padding; `chunks` is how many text windows the longest one filled. `unknown_words`: words that the
    model's vocabulary has not. `notes`: what was done otherwise than one might think. `seconds`: time of each stage.
    `settings`: what reproduces the pictures.
    """

    images: tuple[Image, ...] = ()
    array: npt.NDArray[np.float32] | None = None
    latents: Tensor | None = None
    seeds: tuple[int, ...]
    tokens_used: tuple[int, ...]
    tokens_dropped: tuple[int, ...]
    chunks: int
    unknown_words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
