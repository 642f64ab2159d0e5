"""Image features for FID, KID, diversity and nearest neighbours: from the user's network, or from fewstep's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import CheckpointError, InputError
from fewstep.metrics.clip_score import Clip, load_clip
from fewstep.metrics.pixels import CPU, Images, apply_in_batches, resized_tensor
from fewstep.weights.auxiliary import NetworkId, file_digest

INCEPTION_SIDE = 299


@dataclass(frozen=True, kw_only=True)
class Features:
    """A function from N images to their features (N, D), and the identity of its network."""

    network_id: NetworkId
    of: Callable[[Images], Tensor]


def load_features(what: Path | None = None, clip: Clip | None = None, device: torch.device = CPU) -> Features:
    """The features of a TorchScript file, of the CLIP in a transformers folder, or without either of `clip` or our own.

    A TorchScript module gets (B, 3, 299, 299) from 0 to 255 and gives (B, D), with `return_features=True` if it knows
    that word, as the Inception does that is published for FID. Raises CheckpointError for another file.
    """
    if what is not None and what.is_file():
        return _scripted(what, device)
    if what is not None and not what.is_dir():
        raise InputError(f"there is no file or folder {what}; give a TorchScript file or the folder of a CLIP")
    clip = clip if what is None and clip is not None else load_clip(what, device)
    return Features(network_id=clip.network_id, of=clip.features)


def _scripted(path: Path, device: torch.device) -> Features:
    try:
        module: Any = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a TorchScript module: {str(error).splitlines()[0]}") from error
    takes_features = "return_features" in str(module.forward.schema)
    network = (lambda batch: module(batch, return_features=True)) if takes_features else module
    network_id = NetworkId(name=path.name, digest=file_digest([path]))
    preprocess = partial(resized_tensor, side=INCEPTION_SIDE)
    return Features(network_id=network_id, of=lambda images: apply_in_batches(images, preprocess, network, device))
