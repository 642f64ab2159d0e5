r"""The blocks models anew on a card, planned for five minutes: sharper pictures from more of them.

    fewstep train recipes/blocks_card.py --out runs/blocks-card
    python recipes/blocks_card.py pack runs/blocks-card runs/packed    a file for each model, in half precision
    python recipes/blocks_card.py ship runs/packed                     into src/fewstep/assets, on any machine

It goes on from the models that are shipped, with the same shapes, losses and data as the recipes of each. The decoder
alone is trained first: latents stay what they were, so the UNet and its text tower go on where they stopped, on ten
times as many scenes as before. Then come small, turbo and tiny, as their recipes have them. On two cores of a CPU the
shipped UNet had 555,000 pictures; a card sees as many in less than a minute. Steps are recorded as CUDA graphs
(`plan.cuda_graphs`), in bfloat16.

Hardware: for one NVIDIA H100 or H200, where its first stage has run; not run whole yet, and what ships is not from it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from blocks_base import BLANK, WEIGHTS, Autoencoder, Diffusion, autoencoder_weights
from blocks_data import SIZE, SMALL, Cached
from blocks_model import AUTOENCODER, unet_config
from blocks_small import ship as ship_small
from blocks_tiny import WIDTH, Tiny
from blocks_turbo import BOTH, FINISH, extract
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.distill.add import AddSettings
from fewstep.distill.pruning import PrunedStudentTask
from fewstep.distill.trajectories import RegressionTask, TrajectoryDataset, TrajectorySettings
from fewstep.distill.turbo import TurboTask
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage, TrainingTask
from fewstep.weights.fetch import ASSETS
from fewstep.weights.load import load_model, load_tiny
from fewstep.weights.save import save_model, save_tiny, write_tensors

BASE = "blocks-base"
TURBO_STAGES = ("turbo-walks", "turbo-begun", "blocks-turbo")
MOSTLY_LARGE = (SIZE,) * 7 + (SMALL,)
SHARED = {"precision": "bf16", "log_steps": 100, "save_seconds": 600.0, "keep_checkpoints": 1}


def stages(out: Path) -> Sequence[RecipeStage]:
    """All of them, in an order in which each has what it begins with."""
    data = Cached(folder=out / f"latents-decoder-{SIZE}")
    model = out / "blocks-base" / "model"
    trajectories = RegressionTask(
        model=model, data=data, trajectories=out / "walks", settings=TrajectorySettings(count=16_384, batch_size=256)
    )
    return [
        *_base(out),
        _run(
            out,
            "small-plain",
            PrunedStudentTask(model=model, data=data, output_weight=0.0, feature_weight=0.0),
            5,
            learning_rate=5e-4,
            lr_decay_fraction=0.0,
        ),
        _run(
            out,
            "blocks-small",
            PrunedStudentTask(model=model, data=data, student=out / "small-plain" / "model", feature_weight=0.1),
            22,
            learning_rate=1e-3,
            lr_decay_fraction=0.5,
        ),
        _run(out, "turbo-walks", trajectories, 15, learning_rate=4e-4, lr_decay_fraction=0.5, **_TURBO),
        _turbo(out, "turbo-walks", "turbo-begun", BOTH, 25),
        _turbo(out, "turbo-begun", "blocks-turbo", FINISH, 20),
        _run(
            out,
            "blocks-tiny",
            Tiny(data=data, model=model, start="blocks-tiny"),
            14,
            learning_rate=2e-3,
            lr_decay_fraction=0.6,
            batch_size=64,
            weight_decay=0.0,
        ),
    ]


_TURBO = {"betas": (0.5, 0.99), "ema_decay": 0.998, "warmup_steps": 50, "batch_size": 128}


def _base(out: Path) -> list[RecipeStage]:
    """The decoder, then the UNet with its text tower."""
    pictures = {"batch_size": 128, "weight_decay": 1e-4, "ema_decay": 0.998}
    decoder = Autoencoder(start=BASE, sizes=MOSTLY_LARGE, edges=1.0, decoder=True)
    diffusion = Diffusion(
        start=BASE,
        autoencoder=out / "decoder",
        size_cycle=MOSTLY_LARGE,
        varied=0.7,
        blank=BLANK,
        chunks=48,
        small_chunks=6,
    )
    return [
        _run(out, "decoder", decoder, 25, learning_rate=1e-3, lr_decay_fraction=0.7, **pictures),
        _run(out, "blocks-base", diffusion, 130, learning_rate=1e-3, lr_decay_fraction=0.6),
    ]


def _turbo(out: Path, start: str, name: str, settings: AddSettings, seconds: float) -> RecipeStage:
    task = TurboTask(
        model=out / "blocks-base" / "model",
        data=TrajectoryDataset(folder=out / "walks"),
        student=out / start / "model",
        settings=settings,
        discriminator_lr_multiplier=10.0,
    )
    return _run(out, name, task, seconds, learning_rate=2e-4, lr_decay_fraction=0.4, weight_decay=0.0, **_TURBO)


def _run(out: Path, name: str, task: TrainingTask, seconds: float, **options: object) -> RecipeStage:
    plan = Plan(folder=out / name, seconds=seconds, **{"batch_size": 256, **SHARED, **options})  # type: ignore[arg-type]
    return RecipeStage(task=task, plan=plan)


def pack(out: Path, folder: Path) -> None:
    """Write what the stages in `out` have left as files in `folder`: vae, base, small, turbo and tiny."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, networks in _trained_networks(out).items():
        named = {f"{part}.{key}": value for part, net in networks.items() for key, value in net.state_dict().items()}
        write_tensors(named, folder / f"{name}.safetensors", torch.float16)


def _trained_networks(out: Path) -> dict[str, dict[str, nn.Module]]:
    """The networks of each model that is there: of turbo those of its last stage that has ended."""
    networks: dict[str, dict[str, nn.Module]] = {}
    if (out / "decoder" / WEIGHTS).is_file():
        vae = AutoencoderKL(AUTOENCODER)
        vae.load_state_dict(autoencoder_weights(out / "decoder"))
        networks["vae"] = {"vae": vae}
    for name, stages in {"base": [BASE], "small": ["blocks-small"], "turbo": TURBO_STAGES}.items():
        for stage in stages:
            if (out / stage / "model" / "model_index.json").is_file():
                model = load_model(out / stage / "model", dtype=torch.float32)
                networks[name] = {"unet": model.networks.unet} | (
                    {"text": model.networks.text_encoders[0]} if name == "base" else {}
                )
    if (out / "blocks-tiny" / "tiny" / "config.json").is_file():
        networks["tiny"] = {"tiny": load_tiny(out / "blocks-tiny" / "tiny", dtype=torch.float32)}
    return networks


def ship(folder: Path, assets: Path = ASSETS) -> None:
    """Write what `pack` wrote as the shipped models; their cards and records stay, and are to be written anew."""
    base = load_model(BASE, dtype=torch.float32)
    base.networks.autoencoder.load_state_dict(_packed(folder, "vae", "vae"))
    base.networks.unet.load_state_dict(_packed(folder, "base", "unet"))
    base.networks.text_encoders[0].load_state_dict(_packed(folder, "base", "text"))
    notes = {name: (assets / BASE / name).read_bytes() for name in ("README.md", "training.json")}
    save_model(base, assets / BASE, torch.float16)
    for name, text in notes.items():
        (assets / BASE / name).write_bytes(text)
    with tempfile.TemporaryDirectory() as made:
        for name, resnets in (("small", 1), ("turbo", 2)):
            unet = UNet(unet_config(resnets))
            unet.load_state_dict(_packed(folder, name, "unet"))
            save_model(base.with_unet(unet), Path(made) / name)
        record = (assets / "blocks-small" / "training.json").read_bytes()
        ship_small(Path(made) / "small", assets / "blocks-small")
        (assets / "blocks-small" / "training.json").write_bytes(record)
        extract(Path(made) / "turbo", assets / "blocks-turbo")
    tiny = TinyAutoencoder(WIDTH)
    tiny.load_state_dict(_packed(folder, "tiny", "tiny"))
    save_tiny(tiny, assets / "blocks-tiny", torch.float16)


def _packed(folder: Path, name: str, part: str) -> dict[str, Tensor]:
    tensors = load_file(folder / f"{name}.safetensors")
    return {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "ship"))
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    {"pack": pack, "ship": ship}[arguments.what](*arguments.folders)
