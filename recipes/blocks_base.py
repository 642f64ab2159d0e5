"""blocks-base: the embedded latent diffusion model, trained on blockworld."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.blockworld import captions, render, require_train, scenes, vocabulary
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.train.checkpoint import load_checkpoint
from fewstep.train.loop import Loss, Plan, Trainer
from fewstep.train.losses import AutoencoderLoss, sampled_latents
from fewstep.train.parallel import join_ranks

SIZE = 64
AUTOENCODER = AutoencoderConfig(channels=(16, 32, 64, 64), resnets=1, groups=8, scaling_factor=1.0)


class PicturePool:
    """Rendered training pictures (uint8), a part of which is drawn anew every `refresh_steps` steps."""

    def __init__(self, count: int, *, seed: int, refresh: int = 256, refresh_steps: int = 100) -> None:
        self.seed, self.refresh, self.refresh_steps = seed, refresh, refresh_steps
        self.pictures = self._rendered(count, 0)

    def batch(self, count: int, step: int) -> Tensor:
        """(count, 3, 64, 64) in [-1, 1]."""
        if step % self.refresh_steps == 0:
            places = torch.randperm(len(self.pictures))[: self.refresh]
            self.pictures[places] = self._rendered(self.refresh, step + 1)
        index = torch.randint(len(self.pictures), (count,))
        return self.pictures[index].float() / 127.5 - 1

    def _rendered(self, count: int, step: int) -> Tensor:
        drawn = scenes(count, seed=self.seed + step * 1009)
        require_train(drawn)
        return ((render(drawn, SIZE) + 1) * 127.5).round().byte()


def autoencoder_loss(model: AutoencoderKL, pool: PicturePool, batch: int) -> Loss:
    """Reconstruction of pictures whose colour channels are permuted in half of the batches."""
    weigh = AutoencoderLoss()

    def loss(step: int) -> dict[str, Tensor]:
        image = pool.batch(batch, step)
        if torch.rand(()) < 0.5:  # unseen pairs of colour and shape stay within reach
            image = image[:, torch.randperm(3)]
        image = image.contiguous(memory_format=torch.channels_last)
        moments = model.encode(image)
        output = model.decode(sampled_latents(moments))
        picture, divergence = weigh.picture(output, image), weigh.divergence(moments)
        mse = (output.detach() - image).square().mean((1, 2, 3)) / 4
        return {
            "loss": picture + divergence,
            "psnr": (-10 * mse.log10()).mean(),
            "kl": divergence.detach() / weigh.kl,
        }

    return loss


def autoencoder(run: Path, minutes: float) -> None:
    """Encoder and decoder together."""
    rank, ranks = join_ranks()
    torch.manual_seed(rank)
    plan = Plan(
        folder=run / "autoencoder",
        rate=2e-3,
        seconds=60 * minutes,
        decay=0.5,
        weight_decay=1e-4,
        ema=0.998,
    )
    model = AutoencoderKL(AUTOENCODER).to(memory_format=torch.channels_last)
    trainer = Trainer(model, plan)
    pool = PicturePool(8192, seed=1 + rank * 10**9 + trainer.step * 1013)
    trainer.run(autoencoder_loss(model, pool, 16 // ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("autoencoder", "text", "latents", "unet", "decoder", "export"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    arguments = parser.parse_args()
    if arguments.stage == "autoencoder":
        autoencoder(arguments.run_dir, arguments.minutes)


if __name__ == "__main__":
    main()
