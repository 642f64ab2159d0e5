"""CLIP score: agreement of images and prompts, by the user's CLIP or by fewstep's own towers for block images."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fewstep.blockworld.backbone import SIDE
from fewstep.blockworld.clip import TEXT, ImageTower, block_tokenizer
from fewstep.errors import InputError
from fewstep.metrics.intervals import Estimate
from fewstep.metrics.pixels import BATCH, CPU, Images, apply_in_batches, image_tensor, resized_tensor
from fewstep.models.clip_vision import VisionConfig, VisionTower
from fewstep.models.config import TextConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.auxiliary import ASSETS, NetworkId, load_network
from fewstep.weights.folder import parsed, read_json

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, from 0 to 1, where a folder does not say."""


class Clip(Protocol):
    """Puts images and texts into one space, (N, D) float32; `features` (N, F) are what FID compares."""

    network_id: NetworkId

    def images(self, images: Images) -> Tensor:
        """The embeddings of images."""

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings of prompts."""

    def features(self, images: Images) -> Tensor:
        """The image features (N, F) that FID compares."""


def load_clip(folder: Path | None = None, device: torch.device = CPU) -> Clip:
    """The CLIP in a transformers folder, or without one the towers that come with fewstep, for block images alone.

    It runs on `device`; fewstep's own towers are so small that they stay on the CPU.

    Raises CheckpointError for a folder that is not a `CLIPModel`'s.
    """
    return BlockClip() if folder is None else UserClip(folder, device)


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """(N,): 100 times the cosine of each image and its own text, at least 0 (arXiv:2104.08718, without its 2.5)."""
    if images.shape != texts.shape:
        raise InputError(f"{len(images)} images and {len(texts)} texts have no pairs; give one text for each image")
    return 100 * F.cosine_similarity(images, texts, dim=1).clamp(min=0)


def mean_score(scores: Tensor) -> Estimate:
    """The mean of scores (N,) with its standard error, which for one image is infinite."""
    error = float(scores.std()) / sqrt(len(scores)) if len(scores) > 1 else float("inf")
    return Estimate(float(scores.mean()), error)


class BlockClip:
    """The towers of `fewstep.blockworld.clip`; they see images at 64 x 64 pixels."""

    def __init__(self) -> None:
        self.image, self.text = ImageTower(), TextEncoder(TEXT)
        folder = ASSETS / "block-clip"
        digests = [load_network(folder / name, getattr(self, name)).digest[:8] for name in ("image", "text")]
        self.network_id = NetworkId(name="fewstep's own block-clip", digest="".join(digests))
        self.tokenizer = block_tokenizer()

    def images(self, images: Images) -> Tensor:
        """(N, 64), not normed."""
        return apply_in_batches(images, _unit, self.image)

    def features(self, images: Images) -> Tensor:
        """(N, 128)."""
        return apply_in_batches(images, _unit, self.image.features)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, 64), not normed; of a prompt the first 22 words, and InputError for one that has no word it knows."""
        for prompt in prompts:
            if set(self.tokenizer.encode(prompt)) <= {self.tokenizer.unk}:
                raise InputError(
                    f"{self.network_id.name} knows no word of {prompt!r}; give a CLIP that does, with --clip"
                )
        return _embed(self.text, self.tokenizer, prompts)


class UserClip:
    """A `CLIPModel` in a transformers folder: config.json, weights, tokenizer, and perhaps preprocessor_config.json."""

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        self.device = device
        self.vision = VisionTower(parsed(folder / "config.json", VisionConfig.from_transformers))
        self.text = TextEncoder(parsed(folder / "config.json", _text_config))
        self.network_id = load_network(folder, self.vision, self.text)
        self.vision.to(device)
        self.tokenizer = Tokenizer.from_folder(folder)
        path = folder / "preprocessor_config.json"
        processor = read_json(path) if path.is_file() else {}
        self.mean, self.std = (
            torch.tensor(processor.get(name, default)).view(1, 3, 1, 1)
            for name, default in (("image_mean", MEAN), ("image_std", STD))
        )

    def images(self, images: Images) -> Tensor:
        """(N, D), not normed."""
        return apply_in_batches(images, self.preprocess, self.vision, self.device)

    def features(self, images: Images) -> Tensor:
        """The same: FID over them is known as CLIP-FID."""
        return self.images(images)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D), not normed, of what of a prompt fits into the window."""
        return _embed(self.text, self.tokenizer, prompts)

    def preprocess(self, image: Image.Image) -> Tensor:
        """(1, 3, side, side) as of transformers' CLIPImageProcessor: the shorter side resized, the middle cut out."""
        side = self.vision.config.side
        scale = side / min(image.size)
        width, height = (max(side, int(pixels * scale)) for pixels in image.size)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        return (image_tensor(image.crop((left, top, left + side, top + side))) / 255 - self.mean) / self.std


def _unit(image: Image.Image) -> Tensor:
    return resized_tensor(image, SIDE) / 127.5 - 1


def _text_config(config: dict[str, Any]) -> TextConfig:
    text = {**config["text_config"], "architectures": ["CLIPTextModelWithProjection"]}
    return TextConfig.from_transformers(text | {"projection_dim": config.get("projection_dim", 512)})


@torch.inference_mode()
def _embed(tower: TextEncoder, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    ids = tokenize(prompts, tokenizer, chunk=False).ids[:, 0]
    return torch.cat([tower(part).pooled for part in torch.split(ids, BATCH)])
