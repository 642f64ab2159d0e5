r"""kl-f8, the autoencoder of Stable Diffusion v1, and its decoder ft-EMA, with the published settings.

    fewstep train recipes/kl_f8.py --out runs/kl-f8 task.perceptual=VGG.pt \\
        kl-f8.task.model=START kl-f8.task.data.folder=DATA/openimages-256 ft-ema.task.data.folder=DATA/laion-256

Settings: `configs/autoencoder/autoencoder_kl_32x32x4.yaml` of CompVis/latent-diffusion (12 pictures at a time, two
parts a step, one card) and the card of stabilityai/sd-vae-ft-ema (16 x 12 pictures; the decoder alone, on other
pictures). The rate is 4.5e-6 for each picture of a step; that ft-EMA's is too is our reading, unsure. Its discriminator
judges from the first step, but is a new one, where the published run had the old one still. Hardware (published):
16 A100 for ft-EMA. Not run here; the stage `autoencoder` of `recipes/blocks_base.py` runs on a laptop.

START is a model folder whose autoencoder has the shape (its weights are not read). VGG.pt is a TorchScript file that
gives the features of VGG16 after its five blocks. LPIPS weighs their channels by learned numbers, which is not done
here: `task.perceptual_weight` must make up for it. Without a file the loss has no such term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.train.autoencoder import AutoencoderTask
from fewstep.train.datasets import ShardDataset
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage

RATE = 4.5e-6  # for each picture of a step


def stages(out: Path) -> Sequence[RecipeStage]:
    """The autoencoder from nothing, then its decoder alone."""
    published, tuned = _plans(out)
    return [
        RecipeStage(
            plan=published,
            task=AutoencoderTask(
                model=Path("start"),
                data=ShardDataset(folder=Path("data/openimages-256")),
                fresh=True,
                rescale=True,
                device="cuda",
            ),
        ),
        RecipeStage(
            plan=tuned,
            task=AutoencoderTask(
                model=out / "kl-f8" / "model",
                data=ShardDataset(folder=Path("data/laion-256")),
                discriminator_start=0,
                decoder_only=True,
                device="cuda",
            ),
        ),
    ]


def _plans(out: Path) -> tuple[Plan, Plan]:
    """Of the two stages."""
    published = Plan(
        folder=out / "kl-f8",
        steps=246_803,
        batch_size=12 * 2,
        gradient_accumulation=2,
        learning_rate=RATE * 12 * 2,
        warmup_steps=0,
        lr_decay_fraction=0.0,
        betas=(0.5, 0.9),
        weight_decay=0.0,
        max_grad_norm=float("inf"),
        ema_decay=0.0,
        save_seconds=1800,
    )
    tuned = replace(
        published,
        folder=out / "ft-ema",
        steps=313_198,
        batch_size=12 * 16,
        gradient_accumulation=1,
        learning_rate=RATE * 12 * 16,
        ema_decay=0.9999,
    )
    return published, tuned
