"""blocks-tiny: an autoencoder in TAESD's layout that reads and writes the latents of the blocks models.

    fewstep train recipes/blocks_tiny.py --out runs/blocks

It is taught the pictures that blocks-base's decoder makes of latents, with a little noise in them such as a UNet
leaves, and the latents that its encoder makes of those. A quarter of the decoder's arithmetic, and 155,079 parameters
in all. `python recipes/blocks_tiny.py runs/blocks/blocks-tiny/tiny` copies what is shipped, in half precision, and
prints how far its pictures are from the large decoder's.

Hardware: one of 2 shared cores of an AMD EPYC (Zen 5, AVX-512), bfloat16, no GPU; 8 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blocks_base import noisy_mean, psnr
from blocks_data import Cached, read_once
from torch import Tensor

from fewstep.engines.device import choose_device
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.train.datasets import Source
from fewstep.train.losses import AutoencoderLoss
from fewstep.train.norms import norms_in_half
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.stages import RecipeStage, StageSetup
from fewstep.train.trainer import Objective, Trainer
from fewstep.weights.load import load_model, load_tiny
from fewstep.weights.save import save_tiny

LATENTS = Path("runs/blocks-base/latents-large_autoencoder-128")
WIDTH = 16


def stages(out: Path) -> Sequence[RecipeStage]:
    """One stage."""
    plan = Plan(
        folder=out / "blocks-tiny",
        seconds=8 * 60,
        batch_size=16,
        learning_rate=2e-3,
        lr_decay_fraction=0.6,
        weight_decay=0.0,
        precision="bf16",
    )
    return [RecipeStage(task=Tiny(data=Cached(folder=LATENTS)), plan=plan)]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny autoencoder beside that of `model`, from its latents alone; `start`: another one to go on from."""

    data: Source
    model: str | Path = "blocks-base"
    start: str | Path | None = None
    device: str | None = None

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        torch.manual_seed(plan.seed)
        device = choose_device(self.device)
        large = load_model(self.model, dtype=torch.float32, device=device).networks.autoencoder
        tiny = TinyAutoencoder(WIDTH)
        if self.start is not None:
            tiny.load_state_dict(load_tiny(self.start, dtype=torch.float32).state_dict())
        tiny.to(device)
        norms_in_half(large, plan.precision)
        weigh = AutoencoderLoss()

        def read(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            latents = self.data.batch(micro_batch).latents
            assert latents is not None
            return {"latents": latents}

        def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            micro_batch = micro_batch.on(device)
            latents = micro_batch.inputs(read)["latents"]
            with torch.no_grad():
                noisy = noisy_mean(torch.cat([latents, latents], dim=1), micro_batch)
                target = large.decode(noisy).float()
            output = tiny.decode(noisy)
            error = (tiny.encode(target) - noisy).square().mean()
            return {"loss": weigh.picture(output, target) + error, "latents": error, "psnr": psnr(output, target)}

        def finish(trainer: Trainer) -> None:
            averaged = trainer.averaged("model")
            if trainer.rank == 0:
                tiny.load_state_dict(averaged)
                save_tiny(tiny, plan.folder / "tiny")

        return StageSetup(
            objectives={"model": Objective(network=tiny, loss=loss, kind=lambda micro_batch: None)}, finish=finish
        )


@torch.no_grad()
def ship(model: Path, folder: Path) -> None:
    """Write `model` in half precision, and print what it loses over 500 latents."""
    save_tiny(load_tiny(model, dtype=torch.float32), folder, torch.float16)
    tiny, large = (
        load_tiny(folder, dtype=torch.float32),
        load_model("blocks-base", dtype=torch.float32).networks.autoencoder,
    )
    latents = read_once(LATENTS).latents[:500]
    both = [(tiny.decode(some), large.decode(some)) for some in latents.split(50)]
    loss = torch.stack([psnr(tiny_images, large_images.clamp(-1, 1)) for tiny_images, large_images in both]).mean()
    print(f"{folder}: {loss:.1f} dB from the large decoder's pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("src/fewstep/assets/blocks-tiny"))
    ship(**vars(parser.parse_args()))
