"""What a task gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from torch import Tensor

from fewstep.errors import InputError
from fewstep.images import save_picture
from fewstep.notebook import html_of, png_of
from fewstep.version import __version__
from fewstep.weights.fetch import seen_from


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

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures as PNG, JPEG or WebP, by the ending of `path`, with what made them; the paths written.

        Several pictures are numbered: `cube-1.png`, `cube-2.png`. Files that are there already are replaced. `fewstep
        generate --like` draws such a picture again. InputError for another ending or a folder that is missing.
        """
        if not self.images:
            raise InputError("there is no picture to save; draw with output='pil'")
        path = Path(path)
        names = [path.with_stem(f"{path.stem}-{number}") for number in range(1, len(self.images) + 1)]
        written = [path] if len(self.images) == 1 else names
        places = {name: self.settings[name] for name in ("model", "decoder", "tokenizer") if name in self.settings}
        seen = {name: seen_from(path.parent, str(place)) for name, place in places.items()}
        for file, image, seed in zip(written, self.images, self.seeds, strict=True):
            save_picture(image, file, {"fewstep": __version__, **self.settings, **seen, "seed": seed})
        return written

    def _repr_png_(self) -> bytes | None:
        return png_of(self.images) if self.images else None

    def _repr_html_(self) -> str | None:
        shown = [f"{name} {self.settings[name]}" for name in ("model", "prompt", "steps") if name in self.settings]
        caption = "; ".join((*shown, f"seed {', '.join(map(str, self.seeds))}", *self.notes))
        return html_of(self.images, caption) if self.images else None
