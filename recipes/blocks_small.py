r"""blocks-small: two thirds of blocks-base, begun with its layers and taught by its outputs and blocks.

    torchrun --nproc-per-node 2 -m fewstep train recipes/blocks_small.py --out runs/blocks \\
        task.data.folder=runs/blocks-base/latents-large_autoencoder-128

The stages of small-sd, shorter: plain training, then the teacher's output and features beside it (arXiv:2305.15798).
`python recipes/blocks_small.py runs/blocks/blocks-small/model` writes the UNet that is shipped; the other parts are
those of blocks-base.

Hardware: 2 shared cores of an AMD EPYC (Zen 5, AVX-512), float32, no GPU; 4 and 22 minutes, some 330 and 2,129 steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from blocks_data import Cached
from blocks_turbo import PROMPTS

from fewstep.distill.pruning import PrunedStudentTask
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage
from fewstep.weights.load import load_model
from fewstep.weights.save import save_model


def stages(out: Path) -> Sequence[RecipeStage]:
    """Plain, then distilled."""
    data = Cached(folder=Path("runs/blocks-base/latents-large_autoencoder-128"))
    plain = PrunedStudentTask(model="blocks-base", data=data, output_weight=0.0, feature_weight=0.0)
    taught = PrunedStudentTask(
        model="blocks-base",
        data=data,
        student=out / "small-plain" / "model",
        feature_weight=0.1,
        sample_prompts=PROMPTS,
    )
    shared = {"batch_size": 40, "betas": (0.9, 0.99), "log_steps": 25}
    return [
        RecipeStage(
            task=plain,
            plan=Plan(
                folder=out / "small-plain",
                seconds=4 * 60,
                learning_rate=5e-4,
                lr_decay_fraction=0.0,
                **shared,  # type: ignore[arg-type]
            ),
        ),
        RecipeStage(
            task=taught,
            plan=Plan(
                folder=out / "blocks-small",
                seconds=22 * 60,
                learning_rate=5e-4,
                lr_decay_fraction=0.4,
                sample_steps=250,
                **shared,  # type: ignore[arg-type]
            ),
        ),
    ]


def ship(model: Path, folder: Path) -> None:
    """Write `model` in half precision without the parts that it has in common with blocks-base; a card there stays."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    save_model(load_model(model, dtype=torch.float32).with_spec(name="blocks-small"), folder, torch.float16)
    for shared in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / shared)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_fewstep"]["base"] = "blocks-base"
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    card.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("src/fewstep/assets/blocks-small"))
    ship(**vars(parser.parse_args()))
