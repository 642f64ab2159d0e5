"""Losses of latent diffusion models, their weights, and the time steps to train at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Prediction
from fewstep.models.autoencoder import Posterior


def min_snr_weight(prediction: Prediction, alpha_bar: Tensor, gamma: float, *, floor: float = 0.0) -> Tensor:
    """Weight of a squared error so that it counts as `SNR` in x0, held between `floor` and `gamma`.

    `gamma` 5 and no floor is arXiv:2303.09556, eq. 5. A floor of 1 (arXiv:2202.00512, sec. 4) keeps the noisiest levels
    in the loss, where the layout of a picture is decided.
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(floor, gamma)
    if prediction == "epsilon":
        return weight / snr
    if prediction == "v_prediction":
        return weight / (snr + 1)
    return weight


def stratified_timesteps(count: int, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) int64 in [0, steps): one from each of `count` equal parts of the range, shuffled.

    Each alone is uniform; together they cover the range, which takes variance out of the loss.
    """
    share = (torch.arange(count) + torch.rand((), generator=generator)) / count
    order = torch.randperm(count, generator=generator)
    return (share * steps).long().clamp(max=steps - 1)[order]


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """The picture's and the latents' error, term by term; pictures are in [-1, 1].

    `chroma`: how much more a fully saturated pixel counts than a grey one (objects are coloured, the stage is not);
    `edges`: weight of the error of the differences between neighbours; `kl`: weight of the mean divergence per latent.
    """

    chroma: float = 3.0
    squared: float = 2.0
    edges: float = 0.5
    kl: float = 1e-4

    def picture(self, output: Tensor, image: Tensor) -> Tensor:
        """Weighted L1 + `squared` * MSE + `edges` * L1 of differences; both (B, 3, H, W)."""
        saturation = (image.amax(1, keepdim=True) - image.amin(1, keepdim=True)).clamp(max=1)
        weight = 1 + self.chroma * saturation
        error = output - image
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
        return (weight * (error.abs() + self.squared * error.square())).mean() + self.edges * edges

    def divergence(self, moments: Tensor) -> Tensor:
        """`kl` times the mean divergence of the latents' normal distributions from N(0, 1); moments (B, 2C, h, w)."""
        return self.kl * Posterior.of(moments).kl().mean()
