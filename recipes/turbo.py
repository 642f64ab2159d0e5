r"""SD-Turbo and SDXL-Turbo: adversarial diffusion distillation with the published settings (arXiv:2311.17042).

    torchrun --nproc-per-node 8 -m fewstep train recipes/turbo.py --stage sd-turbo --out runs/turbo \\
        task.data.folder=DATA/512

4,000 steps of 128 pictures, lambda 2.5, gamma 1e-5, student time steps 249, 499, 749 and 999, as in the paper's
ablations. The paper does not tell learning rates: ours are those that trained `recipes/blocks_turbo.py`, scaled down as
large models need. The discriminator sees the teacher's own features of noisy latents (arXiv:2403.12015) instead of
DINOv2's features of pictures, so nothing has to be decoded. Hardware: not run here; at least one card of 80 GB for
each process for SDXL.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.distill.add import AddSettings
from fewstep.distill.turbo import TurboTask
from fewstep.train.datasets import ShardDataset
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage


def stages(out: Path) -> Sequence[RecipeStage]:
    """One stage for each model; choose with --stage."""

    def run(name: str, teacher: str, guidance: float) -> RecipeStage:
        plan = Plan(
            folder=out / name,
            steps=4000,
            batch_size=128,
            gradient_accumulation=4,
            learning_rate=1e-5,
            warmup_steps=100,
            lr_decay_fraction=0.0,
            betas=(0.0, 0.99),
            weight_decay=0.0,
            precision="bf16",
            parallelism="shard",
            activation_checkpointing=True,
            save_seconds=900,
        )
        settings = AddSettings(guidance_scale=guidance)
        data = ShardDataset(folder=Path("data/512"))
        return RecipeStage(task=TurboTask(model=teacher, data=data, settings=settings, device="cuda"), plan=plan)

    return [run("sd-turbo", "sd-v2-1", 3.0), run("sdxl-turbo", "sdxl-base", 3.0)]
