r"""Small Stable Diffusion v0: half the UNet of sd-v1-4, by the card of OFA-Sys/small-stable-diffusion-v0.

    torchrun --nproc-per-node 8 -m fewstep train recipes/small_sd.py --out runs/small-sd \\
        task.data.folder=DATA/improved-aesthetics-6plus

Hardware (published): 8 A100 80 GB, batch 8 x 8 x 2 = 128, the UNet alone trained. Not run here:
`recipes/blocks_small.py` is the same road on blockworld. The learning rate rises to 1e-5 in 10,000 steps and stays. The
card says that the last two stages add the teacher's noise as a soft target; the weights (a half each, then 0.7 and 0.3)
are our reading, unsure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.distill.pruning import PrunedStudentTask
from fewstep.train.datasets import ShardDataset
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage

DATA = ShardDataset(folder=Path("data/improved-aesthetics-6plus"))
V1_4, V1_5 = "sd-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5"


def stages(out: Path) -> Sequence[RecipeStage]:
    """Plain training from the teacher's layers, then two teachers."""

    def run(name: str, task: PrunedStudentTask, steps: int) -> RecipeStage:
        plan = Plan(
            folder=out / name,
            steps=steps,
            batch_size=128,
            gradient_accumulation=2,
            learning_rate=1e-5,
            warmup_steps=10_000,
            lr_decay_fraction=0.0,
            betas=(0.9, 0.999),
            precision="fp16",
            activation_checkpointing=True,
            save_seconds=1800,
        )
        return RecipeStage(task=task, plan=plan)

    def task(teacher: str, student: Path | None, own: float, output: float) -> PrunedStudentTask:
        return PrunedStudentTask(
            model=teacher,
            data=DATA,
            student=student,
            denoising_weight=own,
            output_weight=output,
            feature_weight=0.0,
            device="cuda",
        )

    return [
        run("pretrained", task(V1_4, None, 1.0, 0.0), 500_000),
        run("from-v1-4", task(V1_4, out / "pretrained" / "model", 0.5, 0.5), 400_000),
        run("from-v1-5", task(V1_5, out / "from-v1-4" / "model", 0.3, 0.7), 200_000),
    ]
