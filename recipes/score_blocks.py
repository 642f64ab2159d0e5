"""How often blocks-base draws what its prompt says, by the algorithmic reader, on the split it never saw.

python recipes/score_blocks.py --run-dir runs/blocks-base --count 200
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blocks_base import PREDICTION, newest_autoencoder, trained
from blocks_data import SIZE, block_tokenizer
from blocks_model import LatentDiffusion
from torch import Tensor

from fewstep.data.blockworld import captions, render, scenes
from fewstep.diffusion.denoiser import denoiser
from fewstep.diffusion.guidance import Guidance, guided
from fewstep.diffusion.samplers import sampler
from fewstep.diffusion.schedule import noise_schedule, sigmas_for
from fewstep.evaluate.readers import BlockReader, Grades, grade
from fewstep.images import to_pil
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.text.prompt import tokenize

BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sampled for the exam."""

    steps: int = 10
    guidance: float = 3.5
    size: int = SIZE
    sampler: str = "ddim"
    schedule: str = "trailing"


@torch.inference_mode()
def sampled(model: LatentDiffusion, prompts: Sequence[str], how: Sampling, seed: int) -> Tensor:
    """Latents (B, 4, h, w) for prompts."""
    ids = tokenize(["", *prompts], block_tokenizer()).ids[:, 0]
    states = model.text(ids).last
    pair = torch.cat([states[:1].expand(len(prompts), -1, -1), states[1:]])
    schedule = noise_schedule()

    def predict(x: Tensor, t: float) -> Tensor:
        output: Tensor = model.unet(x, torch.full((len(x),), t), pair if len(x) > len(prompts) else states[1:])
        return output

    plain = denoiser(predict, schedule, PREDICTION)
    denoise = guided(plain, plain, Guidance(scale=how.guidance), PREDICTION)
    sigmas = sigmas_for(how.schedule, how.steps, schedule)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(len(prompts), 4, how.size // 8, how.size // 8, generator=generator)  # noqa: E731
    spec = sampler(how.sampler)
    x = draw() * spec.initial_scale(how.schedule, sigmas[0])
    for step in spec(denoise, x, sigmas, noise=draw):
        x = step.x
    return x


@torch.inference_mode()
def examined(
    model: LatentDiffusion, vae: AutoencoderKL, how: Sampling, split: str, count: int, *, single: float, style: str
) -> tuple[Grades, Tensor, list[str]]:
    """Grades of `count` pictures, the pictures and the prompts."""
    drawn = scenes(count, seed=77, split=split, single=single)
    prompts = captions(drawn, seed=78, style=style)
    parts = [prompts[i : i + BATCH] for i in range(0, count, BATCH)]
    latents = [sampled(model, part, how, 1000 + i) for i, part in enumerate(parts)]
    images = torch.cat([vae.decode(z.contiguous(memory_format=torch.channels_last)) for z in latents]).clamp(-1, 1)
    return grade(BlockReader(how.size).read(images), drawn, prompts), images, prompts


@torch.inference_mode()
def round_trip(vae: AutoencoderKL, split: str, count: int, size: int, *, single: float) -> Grades:
    """What the autoencoder alone leaves readable."""
    drawn = scenes(count, seed=79, split=split, single=single)
    pictures = render(drawn, size).contiguous(memory_format=torch.channels_last)
    images = torch.cat([vae.decode(vae.encode(part).chunk(2, 1)[0]) for part in pictures.split(BATCH)])
    return grade(BlockReader(size).read(images.clamp(-1, 1)), drawn, captions(drawn, seed=79, style="canonical"))


def sheet(images: Tensor, path: Path, columns: int = 10) -> None:
    """A contact sheet."""
    rows = len(images) // columns
    side = images.shape[-1]
    tiles = images[: rows * columns].reshape(rows, columns, 3, side, side)
    whole = tiles.permute(2, 0, 3, 1, 4).reshape(1, 3, rows * side, columns * side)
    to_pil(whole)[0].resize((columns * 128, rows * 128), 0).save(path)


def line(name: str, grades: Grades) -> str:
    """One row of the table."""
    names = ("count", "colours", "shapes_bag", "shapes_bound", "size", "relation_kind", "direction", "exact")
    return f"{name:28s} " + " ".join(f"{key} {getattr(grades, key):.3f}" for key in names)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--objects", nargs="+", choices=("one", "two"), default=("one", "two"))
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--style", default="varied")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--schedule", default="trailing")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--stage", default="large_unet")
    parser.add_argument("--only-autoencoder", action="store_true")
    a = parser.parse_args()
    vae = newest_autoencoder(a.run_dir)
    started = time.monotonic()
    for name in a.objects:
        single = float(name == "one")
        if a.only_autoencoder:
            print(
                line(f"round trip {name} {a.split}", round_trip(vae, a.split, a.count, a.size, single=single)),
                flush=True,
            )
            continue
        model = LatentDiffusion().eval()
        model.load_state_dict(trained(a.run_dir / a.stage))
        how = Sampling(size=a.size, steps=a.steps, guidance=a.guidance, sampler=a.sampler, schedule=a.schedule)
        grades, images, prompts = examined(model, vae, how, a.split, a.count, single=single, style=a.style)
        print(line(f"{name} {a.split} {a.style}", grades), flush=True)
        sheet(images, a.run_dir / f"sheet_{a.size}_{name}.png")
        marks = zip(grades.images, prompts, strict=True)
        (a.run_dir / f"sheet_{a.size}_{name}.txt").write_text(
            "\n".join(f"{'ok ' if m else 'BAD'} {p}" for m, p in marks)
        )
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
