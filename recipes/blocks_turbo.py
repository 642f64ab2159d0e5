r"""blocks-turbo: blocks-base in one to four steps, by adversarial diffusion distillation of latents.

    torchrun --nproc-per-node 2 -m fewstep train recipes/blocks_turbo.py --out runs/blocks \\
        task.data.folder=runs/blocks-base/latents-large_autoencoder-128

The published settings (arXiv:2311.17042), but for three: the discriminator sees the teacher's features of noisy
latents (arXiv:2403.12015), the teacher is guided, and real latents under another picture's words count as drawn.
HARDWARE_AND_SCORES
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blocks_data import Cached

from fewstep.distill.add import AddSettings
from fewstep.distill.turbo import TurboTask
from fewstep.train.plan import Plan
from fewstep.train.run import Run

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


def stages(out: Path) -> Sequence[Run]:
    """One stage, and the two halves of its loss alone, for the ablation: choose with --stage."""
    both = AddSettings(guidance=3.0, mismatched=0.5)
    halves = {
        "distilled_only": AddSettings(guidance=3.0, adversarial=0.0),
        "adversarial_only": AddSettings(distill=0.0, mismatched=0.5),
    }
    return [_run(out / name, settings) for name, settings in {"blocks-turbo": both, **halves}.items()]


def _run(folder: Path, settings: AddSettings) -> Run:
    plan = Plan(
        folder=folder,
        seconds=60 * 60,
        batch=32,
        rate=2e-4,
        warmup=50,
        decay=0.3,
        betas=(0.5, 0.99),
        weight_decay=0.0,
        ema=0.998,
        log_steps=25,
        sample_steps=250,
    )
    data = Cached(folder=Path("runs/blocks-base/latents-large_autoencoder-128"))
    task = TurboTask(model="blocks-base", data=data, settings=settings, discriminator_rate=5.0, sample_prompts=PROMPTS)
    return Run(task=task, plan=plan)
