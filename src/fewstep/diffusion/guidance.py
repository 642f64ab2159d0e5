"""Guidance: a denoiser that follows the prompt more closely than the network alone does."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, Prediction, output_from_x0, x0_from_output


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly to follow the prompt, and at which noise levels.

    `scale` at or below 1 is no guidance. `rescale`, 0 ... 1, gives the result back the contrast of the
    conditional prediction (arXiv:2305.08891, sec. 3.4). Outside `interval`, from the lowest to the highest
    sigma, both included, the scale is 1 (arXiv:2404.07724).
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, inf)

    def acts_at(self, sigma: float) -> bool:
        """Whether guidance changes anything at this level, and so whether it has to be paid for."""
        return self.scale > 1 and self.interval[0] <= sigma <= self.interval[1]


def guided(cond: Denoiser, pair: Denoiser, guidance: Guidance, prediction: Prediction = "epsilon") -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): a call of `pair`, or of `cond` where that is enough.

    `cond` takes B rows. `pair` takes 2B, the unconditional ones first: the same network with both conditions
    bound. `prediction` matters to `rescale`, which compares outputs of the network; guidance itself may be
    done on `x0`, since each form of output is affine in it.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if not guidance.acts_at(sigma):
            return cond(x, sigma)
        x0_uncond, x0_cond = pair(torch.cat([x, x]), sigma).chunk(2)
        x0 = x0_uncond + guidance.scale * (x0_cond - x0_uncond)
        if guidance.rescale == 0:
            return x0
        output, reference = (output_from_x0(each, x, sigma, prediction) for each in (x0, x0_cond))
        gain = 1 + guidance.rescale * (_deviation(reference) / _deviation(output) - 1)
        return x0_from_output(gain * output, x, sigma, prediction)

    return denoise


def _deviation(output: Tensor) -> Tensor:
    """The standard deviation of each row, (B, 1, 1, 1)."""
    return output.std(dim=tuple(range(1, output.ndim)), keepdim=True)
