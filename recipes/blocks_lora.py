"""A LoRA for the embedded model: blockworld in ink and wash on paper, a style that it has never seen.

    fewstep train recipes/blocks_lora.py --out runs/lora
    python recipes/blocks_lora.py runs/lora/ink/lora.safetensors    draws docs/images/blocks-lora-{before,after}.png

Both sheets have the same prompts, from held-out scenes, and the same seeds.

Hardware: one core of an AMD EPYC (Zen 5, AVX-512), float32, no GPU; 0.4 s a step, two minutes in all. Rank 8 in every
attention, feed-forward layer and convolution of the UNet: 568,640 parameters, 1.2 MB in half precision. The style is
one that the frozen autoencoder can draw; of a night with dark backgrounds it made coloured fog.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fewstep
from fewstep.adapters.inject import CONVOLUTIONS, TRANSFORMERS
from fewstep.blockworld import captions, scenes
from fewstep.images import contact_sheet
from fewstep.train.datasets import Blockworld, CaptionedBatch
from fewstep.train.diffusion import DiffusionTask
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.stages import RecipeStage

PAPER, INK = (0.97, 0.93, 0.82), (0.22, 0.12, 0.10)
SEED, COLUMNS, ROWS = 7, 6, 3  # of the sheets


def ink_and_wash(pictures: Tensor) -> Tensor:
    """Pictures of blockworld (B, 3, H, W) in [-1, 1] as drawings: dark outlines, pale colours, no stage, no shadows."""
    rgb = (pictures + 1) / 2
    paper, ink = (torch.tensor(colour)[:, None, None] for colour in (PAPER, INK))
    saturation = rgb.amax(1, keepdim=True) - rgb.amin(1, keepdim=True)
    wash = torch.lerp(paper.expand_as(rgb), 0.6 * rgb + 0.4 * paper, ((saturation - 0.12) / 0.3).clamp(0, 1))
    return torch.lerp(wash, ink, outlines(rgb)) * 2 - 1


def outlines(rgb: Tensor) -> Tensor:
    """(B, 1, H, W) in [0, 1]: soft lines, three pixels wide, where a colour channel jumps."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(3, 1, 3, 3)
    padded = F.pad(rgb, (1, 1, 1, 1), mode="replicate")
    across, down = (F.conv2d(padded, kernel, groups=3) for kernel in (sobel, sobel.mT))
    lines = ((across.hypot(down).amax(1, keepdim=True) - 0.25) / 0.5).clamp(0, 1)
    return F.avg_pool2d(F.max_pool2d(lines, 3, 1, 1), 3, 1, 1, count_include_pad=False)


@dataclass(frozen=True, kw_only=True)
class InkAndWash:
    """Blockworld in the style."""

    data: Blockworld = field(default_factory=lambda: Blockworld(size=128))

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        """See `fewstep.train.datasets.Source`."""
        plain = self.data.batch(micro_batch)
        assert plain.pictures is not None
        return replace(plain, pictures=ink_and_wash(plain.pictures))


def stages(out: Path) -> Sequence[RecipeStage]:
    """One stage of 200 steps of 8."""
    task = DiffusionTask(
        model="blocks-base",
        data=InkAndWash(),
        weighting="min_snr",
        snr_floor=1.0,
        lora_rank=8,
        lora_targets=(*TRANSFORMERS, *CONVOLUTIONS),
    )
    plan = Plan(
        folder=out / "ink",
        steps=200,
        batch_size=8,
        learning_rate=2e-3,
        warmup_steps=10,
        lr_decay_fraction=0.5,
        weight_decay=0.0,
        ema_decay=0.95,
        log_steps=10,
    )
    return [RecipeStage(task=task, plan=plan)]


def draw_sheets(lora: Path, folder: Path) -> None:
    """Two contact sheets in `folder`: the same prompts and seeds without and with the LoRA."""
    pipe = fewstep.load("blocks-base")
    prompts = captions(scenes(COLUMNS * ROWS, seed=91, split="heldout", single=0.35), seed=91, style="canonical")
    for name in ("before", "after"):
        if name == "after":
            fewstep.add_lora(pipe, lora)
        drawn = pipe.text_to_image(prompts, seed=SEED).images
        contact_sheet(drawn, COLUMNS).save(folder / f"blocks-lora-{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    draw_sheets(**vars(parser.parse_args()))
