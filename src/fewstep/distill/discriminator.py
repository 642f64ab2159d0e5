"""The discriminator of adversarial distillation: heads on a frozen network's features, and its losses."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fewstep.engines.engine import Conditioning
from fewstep.models.unet import UNet
from fewstep.train.forward_process import ForwardProcess
from fewstep.train.plan import MicroBatch

HEAD_WIDTH = 64


class DiscriminatorInput(NamedTuple):
    """Feature maps (B, C_k, h_k, w_k) and the condition (B, D) that the heads judge them by."""

    maps: list[Tensor]
    condition: Tensor


class FeatureExtractor(Protocol):
    """A frozen feature network; gradients pass through it to the latents.

    `channels`: of its maps. `condition`: width of the text condition. `embedding`: width of a view's embedding.
    """

    channels: tuple[int, ...]
    condition: int
    embedding: int

    def view(self, latents: Tensor) -> Tensor:
        """The network's input for clean latents (B, 4, h, w): the latents themselves, or the decoded pictures."""

    def embedded(self, view: Tensor) -> Tensor:
        """Embeddings (B, embedding) of a view."""

    def __call__(
        self, view: Tensor, conditioning: Conditioning, micro_batch: MicroBatch, purpose: str
    ) -> DiscriminatorInput:
        """The maps of a view and the text condition; random numbers come from `micro_batch` under `purpose`."""


class NoisyLatentFeatures:
    """Features of the down blocks and the mid block of a frozen UNet, on latents with noise added.

    As in latent adversarial distillation (arXiv:2403.12015): no decoding, the text is in the features by cross-
    attention, and the noise level chooses between texture (low) and layout (high). t is uniform in `levels`.
    """

    embedding = 0

    def __init__(self, unet: UNet, process: ForwardProcess, levels: tuple[int, int] = (0, 750)) -> None:
        self.unet = unet.eval().requires_grad_(False)
        self.process, self.levels = process, levels
        stages = [stage for stage in unet.config.stages if stage.depth]
        self.channels = (*(stage.channels for stage in stages for _ in range(stage.resnets)), stages[-1].channels)
        self.condition = unet.config.context

    def view(self, latents: Tensor) -> Tensor:
        """See `Features`: the latents themselves."""
        return latents

    def embedded(self, view: Tensor) -> Tensor:
        """See `Features`: nothing, (B, 0)."""
        return view.new_zeros(len(view), 0)

    def __call__(
        self, view: Tensor, conditioning: Conditioning, micro_batch: MicroBatch, purpose: str
    ) -> DiscriminatorInput:
        (low, high), micro_batch = self.levels, micro_batch.on(view.device)
        t = (low + (high - low) * micro_batch.rand(f"{purpose} t")).long()
        eps = micro_batch.randn(f"{purpose} noise", *view.shape[1:])
        x = self.process.noised(view, eps, t)
        return DiscriminatorInput(encoder_maps(self.unet, x, t.float(), conditioning), conditioning.context.mean(1))


def encoder_maps(unet: UNet, x: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
    """The outputs of the transformers in a UNet's down blocks and of its mid block, for x (B, C, h, w) and t (B,)."""
    emb = unet.embedding(t, x.dtype, conditioning.pooled, conditioning.sizes)
    x = unet.conv_in(x)
    maps: list[Tensor] = []
    for block in unet.down_blocks:
        skips: list[Tensor] = []
        x = block(x, emb, conditioning.context, skips)
        attentions = block.attentions
        assert isinstance(attentions, nn.ModuleList)
        maps += skips[: len(attentions)]
    return [*maps, unet.mid_block(x, emb, conditioning.context)]


class Head(nn.Module):
    """How real each place of a feature map looks: maps (B, C, h, w), condition (B, D) -> (B, h, w).

    Two convolutions under spectral norm; the condition enters by projection (arXiv:1802.05637), as the heads of
    arXiv:2301.09515, which adversarial diffusion distillation takes over.
    """

    def __init__(self, channels: int, condition: int, width: int = HEAD_WIDTH) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, affine=False)
        self.first = spectral_norm(nn.Conv2d(channels, width, 1))
        self.second = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.project = nn.Linear(condition, width)
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        if maps.device.type == "cpu":
            return self._logits(maps, condition)
        with torch.autocast(maps.device.type, enabled=False):  # that of cards spoils the products of spectral norms
            return self._logits(maps.float(), condition.float())

    def _logits(self, maps: Tensor, condition: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(self.norm(maps)), 0.2)
        h = h + F.leaky_relu(self.second(h), 0.2)
        projected = self.project(condition)[:, :, None, None]
        logits: Tensor = self.out(h)[:, 0] + (h * projected).sum(1) / sqrt(h.shape[1])
        return logits


class Discriminator(nn.Module):
    """A head on each map of a feature network: -> K logits (B, h_k, w_k), positive where latents look real."""

    def __init__(self, channels: Sequence[int], condition: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(count, condition) for count in channels)

    def forward(self, inputs: DiscriminatorInput) -> list[Tensor]:
        return [head(maps, inputs.condition) for head, maps in zip(self.heads, inputs.maps, strict=True)]


def generator_loss(logits: Sequence[Tensor]) -> Tensor:
    """The student's adversarial loss: minus the mean logit, mean over the heads (arXiv:2311.17042, eq. 2)."""
    return -torch.stack([logit.mean() for logit in logits]).mean()


def hinge(logits: Sequence[Tensor], sign: float) -> Tensor:
    """The discriminator's loss: 0 where `sign` times the logit is at least 1; 1 for real latents, -1 for generated."""
    return torch.stack([F.relu(1 - sign * logit).mean() for logit in logits]).mean()


def gradient_penalty(discriminator: Discriminator, inputs: DiscriminatorInput) -> tuple[list[Tensor], Tensor]:
    """The logits of real latents, and R1: the squared gradient of their sum by the heads' input, mean over pictures.

    As published (arXiv:2311.17042, sec. 3.2) it is taken at the features, not at the pictures.
    """
    maps = [feature.detach().requires_grad_() for feature in inputs.maps]
    logits = discriminator(DiscriminatorInput(maps, inputs.condition))
    total = torch.stack([logit.mean((1, 2)).sum() for logit in logits]).sum()
    gradients = torch.autograd.grad(total, maps, create_graph=True)
    return logits, torch.stack([gradient.square().sum((1, 2, 3)).mean() for gradient in gradients]).mean()
