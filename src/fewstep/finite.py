"""NaN and infinity in the stages of a run, found without a wait for the card at each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import NotFiniteError

_HALF = "dtype='float32'"
REMEDIES = {
    "the text encoder": _HALF,
    "the encoder": _HALF,
    "the denoising steps": f"a lower guidance_scale, another sampler, or {_HALF}",
    "the decoder": _HALF,
}
"""What to try where a stage overflows."""


class FiniteChecks:
    """Checks of a run's stages: made at once on a CPU, kept on a card until `raise_first` reads them all together."""

    def __init__(self) -> None:
        self._stored: list[tuple[str, Tensor]] = []

    def check(self, stage: str, tensor: Tensor) -> None:
        """Raise NotFiniteError, now or in `raise_first`, if the tensor that a stage made is not finite."""
        finite = tensor.isfinite().all()
        if finite.is_cuda:
            self._stored.append((stage, finite))
        else:
            require_finite(stage, bool(finite))

    def raise_first(self) -> None:
        """Raise NotFiniteError for the first stage whose check failed on a card; waits for it."""
        stored, self._stored = self._stored, []
        found = torch.stack([finite for _, finite in stored]).tolist() if stored else []
        for (stage, _), finite in zip(stored, found, strict=True):
            require_finite(stage, finite)


def require_finite(stage: str, finite: bool) -> None:
    """Raise NotFiniteError, with what to try, unless what `stage` made is finite."""
    if not finite:
        raise NotFiniteError(f"{stage} gave NaN or infinity; try {REMEDIES[stage]}")
