r"""blocks-small: two thirds of blocks-base, begun with its layers and taught by its outputs and blocks.

    torchrun --nproc-per-node 2 -m fewstep train recipes/blocks_small.py --out runs/blocks \\
        task.data.folder=runs/blocks-base/latents-large_autoencoder-128

The stages of small-sd, shorter: plain training, then the teacher's output and features beside it (arXiv:2305.15798).
HARDWARE_AND_SCORES
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blocks_data import Cached
from blocks_turbo import PROMPTS

from fewstep.distill.small import SmallTask
from fewstep.train.plan import Plan
from fewstep.train.run import Run


def stages(out: Path) -> Sequence[Run]:
    """Plain, then distilled."""
    data = Cached(folder=Path("runs/blocks-base/latents-large_autoencoder-128"))
    plain = SmallTask(model="blocks-base", data=data, output=0.0, features=0.0)
    taught = SmallTask(
        model="blocks-base", data=data, student=out / "small-plain" / "model", features=0.1, sample_prompts=PROMPTS
    )
    shared = {"batch": 40, "betas": (0.9, 0.99), "log_steps": 25}
    return [
        Run(task=plain, plan=Plan(folder=out / "small-plain", seconds=5 * 60, rate=5e-4, decay=0.0, **shared)),  # type: ignore[arg-type]
        Run(
            task=taught,
            plan=Plan(folder=out / "blocks-small", seconds=25 * 60, rate=5e-4, decay=0.4, sample_steps=250, **shared),  # type: ignore[arg-type]
        ),
    ]
