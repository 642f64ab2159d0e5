"""The PatchGAN discriminator of autoencoder training, its hinge loss and the adaptive weight."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """How real each patch looks: pictures (B, 3, H, W) in [-1, 1] -> (B, 1, H/8 - 2, W/8 - 2), with 3 `layers`.

    The PatchGAN of arXiv:1611.07004, app. 6.1.2: a patch is 70 pixels wide. As in latent diffusion's training, the
    norms take the statistics of the pictures that they are given together; they keep none.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [min(2**i, 8) * width for i in range(layers + 1)]
        steps: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            steps += [
                nn.Conv2d(before, after, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(after, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        self.steps = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.steps(pictures)
        return logits


def _initialise(module: nn.Module) -> None:
    """Small normal weights, as arXiv:1511.06434 has them."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's loss: 0 where logits of real patches are above 1 and those of generated ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + generated).mean())


def adaptive_weight(error: Tensor, adversarial: Tensor, layer: Tensor) -> Tensor:
    """What makes the adversarial loss pull at the weights `layer` as hard as the error does: a scalar, no gradient.

    The norm of the error's gradient over that of the adversarial loss, at most 1e4 (arXiv:2012.09841, eq. 7).
    """
    norms: list[Tensor] = [
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (error, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST_WEIGHT)
