r"""The blocks models anew on a card, in five minutes: sharper pictures from more of them.

    fewstep train recipes/blocks_card.py --out runs/blocks-card
    python recipes/blocks_small.py runs/blocks-card/blocks-small/model
    python recipes/blocks_tiny.py runs/blocks-card/blocks-tiny/tiny

It goes on from the models that are shipped, with the same shapes, losses and data as the recipes of each. The decoder
alone is trained first: latents stay what they were, so the UNet and its text tower go on where they stopped, on ten
times as many scenes as before. Then come small, turbo and tiny, as their recipes have them. On two cores of a CPU the
shipped UNet had 555,000 pictures; a card sees as many in less than a minute. Steps are recorded as CUDA graphs
(`plan.replayed`), in bfloat16.

Hardware: one NVIDIA H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blocks_base import BLANK, Autoencoder, Diffusion
from blocks_data import SIZE, SMALL, Cached
from blocks_tiny import Tiny
from blocks_turbo import BOTH, FINISH

from fewstep.distill.add import AddSettings
from fewstep.distill.small import SmallTask
from fewstep.distill.turbo import TurboTask
from fewstep.distill.walks import Walks, WalkSettings, WalkTask
from fewstep.train.plan import Plan
from fewstep.train.run import Run, Task

BASE = "blocks-base"
MOSTLY_LARGE = (SIZE,) * 7 + (SMALL,)
SHARED = {"precision": "bf16", "log_steps": 100, "save_seconds": 600.0, "keep": 1}


def stages(out: Path) -> Sequence[Run]:
    """All of them, in an order in which each has what it begins with."""
    data = Cached(folder=out / f"latents-decoder-{SIZE}")
    model = out / "blocks-base" / "model"
    walked = WalkTask(model=model, data=data, walks=out / "walks", settings=WalkSettings(count=16_384, batch=256))
    return [
        *_base(out),
        _run(out, "small-plain", SmallTask(model=model, data=data, output=0.0, features=0.0), 5, rate=5e-4, decay=0.0),
        _run(
            out,
            "blocks-small",
            SmallTask(model=model, data=data, student=out / "small-plain" / "model", features=0.1),
            22,
            rate=1e-3,
            decay=0.5,
        ),
        _run(out, "turbo-walks", walked, 15, rate=4e-4, decay=0.5, **_TURBO),
        _turbo(out, "turbo-walks", "turbo-begun", BOTH, 25),
        _turbo(out, "turbo-begun", "blocks-turbo", FINISH, 20),
        _run(
            out,
            "blocks-tiny",
            Tiny(data=data, model=model, start="blocks-tiny"),
            14,
            rate=2e-3,
            decay=0.6,
            batch=64,
            weight_decay=0.0,
        ),
    ]


_TURBO = {"betas": (0.5, 0.99), "ema": 0.998, "warmup": 50, "batch": 128}


def _base(out: Path) -> list[Run]:
    """The decoder, then the UNet with its text tower."""
    pictures = {"batch": 128, "weight_decay": 1e-4, "ema": 0.998}
    decoder = Autoencoder(start=BASE, sizes=MOSTLY_LARGE, edges=1.0, decoder=True)
    diffusion = Diffusion(
        start=BASE,
        autoencoder=out / "decoder",
        turns=MOSTLY_LARGE,
        varied=0.7,
        blank=BLANK,
        chunks=48,
        small_chunks=6,
    )
    return [
        _run(out, "decoder", decoder, 25, rate=1e-3, decay=0.7, **pictures),
        _run(out, "blocks-base", diffusion, 130, rate=1e-3, decay=0.6),
    ]


def _turbo(out: Path, start: str, name: str, settings: AddSettings, seconds: float) -> Run:
    task = TurboTask(
        model=out / "blocks-base" / "model",
        data=Walks(folder=out / "walks"),
        student=out / start / "model",
        settings=settings,
        discriminator_rate=10.0,
    )
    return _run(out, name, task, seconds, rate=2e-4, decay=0.4, weight_decay=0.0, **_TURBO)


def _run(out: Path, name: str, task: Task, seconds: float, **options: object) -> Run:
    plan = Plan(folder=out / name, seconds=seconds, **{"batch": 256, **SHARED, **options})  # type: ignore[arg-type]
    return Run(task=task, plan=plan)
