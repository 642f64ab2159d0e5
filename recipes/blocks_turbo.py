"""blocks-turbo: blocks-base in one to four steps, by adversarial diffusion distillation in latent space.

    python recipes/blocks_turbo.py train  --run-dir runs/blocks-base --minutes 60
    python recipes/blocks_turbo.py export --run-dir runs/blocks-base

`torchrun --nproc-per-node 2` in place of `python` trains on two processes.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from blocks_data import LatentCache, block_tokenizer
from torch import Tensor

import fewstep
from fewstep.data.blockworld import captions, scenes
from fewstep.distill.add import AddSettings, AdversarialDistillation, Batch
from fewstep.distill.discriminator import NoisyLatentFeatures
from fewstep.engines.engine import Conditioning
from fewstep.errors import InputError
from fewstep.evaluate.readers import BlockReader, grade
from fewstep.images import contact_sheet, to_tensor
from fewstep.models.text_encoder import TextEncoder
from fewstep.text.prompt import tokenize
from fewstep.train.checkpoint import load_checkpoint
from fewstep.train.plan import Part, Plan
from fewstep.train.process import Process
from fewstep.train.ranks import join_ranks, leave_ranks
from fewstep.train.trainer import Trainer
from fewstep.weights.parts import Parts
from fewstep.weights.save import save_parts

SETTINGS = AddSettings(guidance=3.0, mismatched=0.5)
VARIED = 0.7


class CachedBatches:
    """Latents and what a frozen text tower says of their captions."""

    def __init__(self, text: TextEncoder, cache: LatentCache) -> None:
        self.text, self.cache = text.eval().requires_grad_(False), cache
        self.empty = Conditioning(context=self._states(tokenize([""], block_tokenizer()).ids[0]))

    def __call__(self, part: Part) -> Batch:
        index = part.randint("scene", len(self.cache.latents))
        which = part.randint("caption", self.cache.ids.shape[1] - 1) + 1
        which *= part.rand("varied") < VARIED
        return self.cache.latents[index], Conditioning(context=self._states(self.cache.ids[index, which].long()))

    @torch.no_grad()
    def _states(self, ids: Tensor) -> Tensor:
        return self.text(ids).last


def distillation(parts: Parts, cache: LatentCache, settings: AddSettings) -> AdversarialDistillation:
    """The student begins as the teacher, whose encoder also gives the discriminator its features."""
    text = parts.text_encoders[0]
    batches = CachedBatches(text, cache)
    process = Process(prediction=parts.scheduler.prediction)
    teacher = parts.unet.float()
    return AdversarialDistillation(
        copy.deepcopy(teacher).requires_grad_(True),
        teacher,
        NoisyLatentFeatures(teacher, process),
        process,
        batches,
        settings=settings,
        empty=batches.empty,
    )


def train(arguments: argparse.Namespace, settings: AddSettings) -> None:
    """Train, or go on."""
    parts = fewstep.load(arguments.base, device="cpu").parts
    cache = LatentCache.read(arguments.run_dir / f"latents-{arguments.size}")
    add = distillation(parts, cache, settings)
    plan = Plan(
        folder=arguments.run_dir / arguments.stage,
        seconds=60 * arguments.minutes,
        batch=arguments.batch,
        rate=arguments.rate,
        warmup=50,
        decay=0.3,
        ema=0.998,
        weight_decay=0.0,
        betas=(0.5, 0.99),
        seed=5,
        log_steps=25,
    )
    join_ranks()
    Trainer(add.turns(discriminator_rate=arguments.discriminator_rate), plan).run()
    leave_ranks()


def trained(folder: Path, network: str) -> dict[str, Tensor]:
    """The averaged weights of a network in the newest checkpoint."""
    state = load_checkpoint(folder)
    if state is None:
        raise InputError(f"{folder} holds no checkpoint; train first")
    weights: dict[str, Tensor] = state[network]["ema"]
    return weights


def student(arguments: argparse.Namespace) -> Parts:
    """The averaged student in the teacher's place."""
    parts = fewstep.load(arguments.base, device="cpu").parts
    parts.unet.float().load_state_dict(trained(arguments.run_dir / arguments.stage, "student"))
    defaults = replace(
        parts.defaults, steps=1, guidance_scale=0.0, sampler="euler", width=arguments.size, height=arguments.size
    )
    return replace(parts, name="blocks-turbo", defaults=defaults)


def score(arguments: argparse.Namespace) -> None:
    """How much is drawn right at 1, 2 and 4 steps, of captions that were trained on: for choices, not for reports."""
    pipe = fewstep.Pipeline(student(arguments))
    for single in (1.0, 0.0):
        drawn = scenes(arguments.count, seed=31, split="train", single=single)
        prompts = captions(drawn, seed=31, style="canonical")
        for steps in (1, 2, 4):
            result = pipe.text_to_image(prompts, steps=steps, sampler=arguments.sampler, seed=range(len(prompts)))
            pictures = torch.cat([to_tensor(picture) for picture in result.images])
            grades = grade(BlockReader(arguments.size).read(pictures), drawn, prompts)
            print(single, steps, {k: round(v, 3) for k, v in asdict(grades).items() if k != "images"}, flush=True)
            contact_sheet(result.images[:24], 8).save(arguments.run_dir / f"{arguments.stage}_{single:.0f}_{steps}.png")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "score", "export"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", default="turbo")
    parser.add_argument("--base", default="blocks-base")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="of all ranks together")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--discriminator-rate", type=float, default=5.0, help="relative to --rate")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--folder", type=Path, default=Path("src/fewstep/assets/blocks-turbo"))
    for field in fields(AddSettings):
        if isinstance(field.default, float):
            parser.add_argument(f"--{field.name}", type=float, default=getattr(SETTINGS, field.name))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(
        SETTINGS, **{f.name: getattr(arguments, f.name) for f in fields(AddSettings) if isinstance(f.default, float)}
    )
    if arguments.action == "train":
        train(arguments, settings)
    elif arguments.action == "score":
        score(arguments)
    else:
        save_parts(student(arguments), arguments.folder, torch.float16)


if __name__ == "__main__":
    main()
