r"""blocks-turbo: blocks-base in one to four steps, by adversarial diffusion distillation of latents.

    torchrun --nproc-per-node 2 -m fewstep train recipes/blocks_turbo.py --out runs/blocks

The teacher's walks come first: 8,192 of them are kept, and a student learns to be at their ends at once. Then comes
adversarial distillation (arXiv:2311.17042), anchored to the walks; last the same from points of the walks, so that four
steps are as clean as one. Unlike as published, the discriminator sees the teacher's features of noisy latents
(arXiv:2403.12015), the teacher is guided, and real latents under another picture's words count as drawn. The stages of
the ablation, 150 steps each from the student of walks and without the anchor, are for `benchmarks/results`.

It needs the latents of blocks_base.py's last stage. `python recipes/blocks_turbo.py runs/blocks/blocks-turbo/model`
writes what is shipped: a LoRA as large as one of rank 36, biases and norms.

Hardware: 2 shared cores of an AMD EPYC (Zen 5, AVX-512), bfloat16, no GPU; 10 minutes for the walks, then 10, 22 and 16
for 1,375, 1,075 and 775 steps. Score of what is shipped, by `benchmarks.blocks_exam` on 500 held-out prompts of either
kind, mean of both readers, as a share of the base's: 1.00 and 0.96 in one step, 1.02 and 1.00 in four; diversity 0.89.

What mattered: the walks. By adversarial distillation alone, 45 minutes of it, nearly all prompts were drawn right, and
each always as the same picture: 7 % of the teacher's variance over seeds, and mottled stages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from blocks_data import Cached
from safetensors.torch import save_file

from fewstep.adapters.extract import extracted_lora
from fewstep.adapters.save import save_lora
from fewstep.distill.add import AddSettings
from fewstep.distill.trajectories import RegressionTask, TrajectoryDataset, TrajectorySettings
from fewstep.distill.turbo import TurboTask
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage
from fewstep.weights.derived_model import FILE, VECTORS, vectors
from fewstep.weights.load import load_model

RANK = 36
COUNT = 8192
BOTH = AddSettings(
    timestep_probs=(1 / 6, 1 / 6, 1 / 6, 1 / 2),
    distillation_weight=1.0,
    guidance_scale=2.0,
    mismatched_caption_weight=0.5,
    regression_weight=1.0,
    discriminator_timesteps=(0, 300),
)
FINISH = replace(BOTH, distillation_weight=2.5, guidance_scale=2.5, regression_weight=2.0, from_trajectories=True)
SHARED = {
    "batch_size": 32,
    "betas": (0.5, 0.99),
    "ema_decay": 0.998,
    "warmup_steps": 50,
    "log_steps": 25,
    "precision": "bf16",
}
PROMPTS = (
    "a red cube on top of a blue sphere",
    "a small green cone",
    "a yellow torus left of a pink cylinder",
    "a large orange sphere",
    "a cyan cube in front of a purple cone",
    "a blue pyramid right of a red torus",
    "a small yellow cube",
    "a pink sphere on top of a green cube",
)


def stages(out: Path) -> Sequence[RecipeStage]:
    """The teacher's walks, learned by heart; then adversarial distillation; then what each half of its loss gives."""
    data = Cached(folder=Path("runs/blocks-base/latents-large_autoencoder-128"))
    learned = RegressionTask(
        model="blocks-base", data=data, trajectories=out / "walks", settings=TrajectorySettings(count=COUNT)
    )
    plan = Plan(folder=out / "turbo-walks", seconds=10 * 60, learning_rate=3e-4, lr_decay_fraction=0.5, **SHARED)  # type: ignore[arg-type]
    alone = replace(BOTH, regression_weight=0.0)
    ablation = {
        "ablation-both": alone,
        "ablation-distilled": replace(alone, adversarial_weight=0.0),
        "ablation-adversarial": replace(alone, distillation_weight=0.0),
    }
    return [
        RecipeStage(task=learned, plan=plan),
        _run(out, "turbo-walks", "turbo-begun", BOTH, seconds=22 * 60),
        _run(out, "turbo-begun", "blocks-turbo", FINISH, seconds=16 * 60),
        *(_run(out, "turbo-walks", name, settings, steps=150) for name, settings in ablation.items()),
    ]


def _run(out: Path, start: str, name: str, settings: AddSettings, **length: int) -> RecipeStage:
    shared = {
        **SHARED,
        "learning_rate": 2e-4,
        "lr_decay_fraction": 0.4,
        "weight_decay": 0.0,
        "sample_steps": 100,
        **length,
    }
    task = TurboTask(
        model="blocks-base",
        data=TrajectoryDataset(folder=out / "walks"),
        student=out / start / "model",
        settings=settings,
        discriminator_lr_multiplier=10.0,
        sample_prompts=PROMPTS,
    )
    return RecipeStage(task=task, plan=Plan(folder=out / name, **shared))  # type: ignore[arg-type]


def extract(model: Path, folder: Path) -> None:
    """Write what `model` has over blocks-base as a LoRA, and its biases and norms, in half precision."""
    base, tuned = (load_model(what, dtype=torch.float32) for what in ("blocks-base", model))
    lora, left = extracted_lora(base, tuned, rank=RANK, name="blocks-turbo")
    save_lora(lora, folder / FILE, dtype=torch.float16)
    save_file({name: value.half() for name, value in vectors(tuned.networks.unet).items()}, folder / VECTORS)
    print(f"{folder / FILE}: {left:.1%} of the difference left out")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("src/fewstep/assets/blocks-turbo"))
    extract(**vars(parser.parse_args()))
