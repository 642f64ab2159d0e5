r"""Stable Diffusion v1-4: its four stages of training, from the model card of CompVis/stable-diffusion-v1-4.

    torchrun --nnodes 32 --nproc-per-node 8 ... -m fewstep train recipes/sd_v1_4.py --out runs/sd-v1-4 \\
        laion2b-en-256.task.model=START laion2b-en-256.task.data.folder=DATA/256 ...

Hardware (published): 32 x 8 A100 40 GB, batch 32 x 8 x 2 x 4 = 2048, 150,000 hours of one card, 11,250 kg CO2. Not
run here: nobody has these pictures and cards on a desk. `--print-settings` prints it; `recipes/blocks_base.py` is the
same road at a size that runs on a laptop.

START is a folder with the autoencoder and the text tower of v1 (the UNet in it is not read); the data are folders of
`fewstep data prepare`. The original's learning rate is 1e-4 after 10,000 steps of warmup; its average decays by 0.9999.
Captions are left out in the last stage only, which is why the earlier ones cannot be guided.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.data.filters import Filter
from fewstep.train.datasets import ShardDataset
from fewstep.train.diffusion import DiffusionTask
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage

NONE = Filter(min_size=None, min_aesthetic=None, max_watermark=None, max_unsafe=None, missing="keep")
IMPROVED = Filter(min_size=512, min_aesthetic=5.0, max_watermark=0.5, max_unsafe=None)


def stages(out: Path) -> Sequence[RecipeStage]:
    """v1-1 (two stages), v1-2 and v1-4; v1-3 was another branch from v1-2, 195,000 steps with the same settings."""

    def run(
        name: str, start: str | Path, data: ShardDataset, steps: int, *, drop: float = 0.0, fresh: bool = False
    ) -> RecipeStage:
        plan = Plan(
            folder=out / name,
            steps=steps,
            batch_size=2048,
            gradient_accumulation=2,
            learning_rate=1e-4,
            warmup_steps=10_000,
            lr_decay_fraction=0.0,
            betas=(0.9, 0.999),
            max_grad_norm=float("inf"),
            ema_decay=0.9999,
            precision="fp16",
            activation_checkpointing=True,
            save_seconds=1800,
        )
        task = DiffusionTask(model=start, data=data, caption_dropout=drop, fresh=fresh, device="cuda")
        return RecipeStage(task=task, plan=plan)

    small, large, aesthetic = (
        ShardDataset(folder=Path("data") / name, rule=rule)
        for name, rule in (
            ("laion2b-en-256", NONE),
            ("laion-high-resolution-512", NONE),
            ("laion-improved-aesthetics-512", IMPROVED),
        )
    )
    return [
        run("laion2b-en-256", Path("start"), small, 237_000, fresh=True),
        run("v1-1", out / "laion2b-en-256" / "model", large, 194_000),
        run("v1-2", out / "v1-1" / "model", aesthetic, 515_000),
        run("v1-4", out / "v1-2" / "model", aesthetic, 225_000, drop=0.1),
    ]
