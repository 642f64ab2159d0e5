"""blocks-base: the embedded latent diffusion model, trained on blockworld.

Each line is one stage; each goes on where it stopped. `torchrun --nproc-per-node 2` in place of `python` trains on
two processes, as was done for the stages marked *.

    python recipes/blocks_base.py autoencoder       --run-dir runs/blocks-base --minutes 18    * 5050 steps, --batch 8
    python recipes/blocks_base.py text              --run-dir runs/blocks-base --minutes 0.7     150 steps of 128
    python recipes/blocks_base.py decoder           --run-dir runs/blocks-base --minutes 11      3150 steps of 16
    python recipes/blocks_base.py latents           --run-dir runs/blocks-base --chunks 0 10
    python recipes/blocks_base.py small_unet        --run-dir runs/blocks-base --minutes 11      2200 steps of 32
    python recipes/blocks_base.py unet              --run-dir runs/blocks-base --minutes 27    * 3000 steps of 64
    python recipes/blocks_base.py large_autoencoder --run-dir runs/blocks-base --minutes 13      1800 steps of 8 and 16
    python recipes/blocks_base.py latents           --run-dir runs/blocks-base --size 128 --chunks 0 7
    python recipes/blocks_base.py latents           --run-dir runs/blocks-base --size 64 --chunks 0 2
    python recipes/blocks_base.py large_unet        --run-dir runs/blocks-base --minutes 54    * 3616 steps of 40
    python recipes/blocks_base.py export            --run-dir runs/blocks-base

Hardware: 2 shared cores of an AMD EPYC (Zen 5, AVX-512), float32, no GPU; two hours in all, stages side by side where
they could be. Score, by `python -m benchmarks.blocks_exam` on held-out scenes, n = 200 each, guidance 3.5, 10 DDIM
steps at 128 pixels: one object 0.930, two and their relation 0.920. The autoencoder's own round trip is 1.000 and
1.000. After the stage `unet`, at 64 pixels and by `score_blocks.py` with varied captions: 1.000 and 0.950.

What probably mattered: weights that keep the noisiest levels in the loss (`FLOOR`), and a text tower that knows the
slots from the start. Relations and their direction were right after 50,000 samples; a prototype with plain min-SNR
weights, smaller objects and another world had not learned directions in 116,000. They were not varied one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from blocks_data import (
    SIZE,
    SMALL,
    VARIED,
    LatentCache,
    PicturePool,
    blank_words,
    block_tokenizer,
    caption_ids,
    scene_slots,
    write_chunk,
)
from blocks_model import AUTOENCODER, DEFAULTS, LatentDiffusion, grow, slot_loss
from torch import Tensor

from fewstep.data.blockworld import render, require_train, scenes
from fewstep.diffusion.denoiser import Prediction
from fewstep.diffusion.schedule import noise_schedule
from fewstep.errors import InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.text.prompt import tokenize
from fewstep.train.checkpoint import load_checkpoint
from fewstep.train.fold import fold_statistics
from fewstep.train.loop import Loss, Plan, Trainer
from fewstep.train.losses import AutoencoderLoss, min_snr_weight, sampled_latents, stratified_timesteps, target
from fewstep.train.parallel import join_ranks, leave_ranks
from fewstep.weights.parts import Parts
from fewstep.weights.save import save_parts
from fewstep.weights.scheduler import SchedulerConfig

DROP = 0.1  # share of captions left out, for classifier-free guidance
BLANK = 0.15  # share of captions whose colours are left out, and of those whose shapes are
SLOT_WEIGHT = 0.1
FLOOR, GAMMA = 1.0, 5.0  # limits of the weight of an error in x0
PREDICTION: Prediction = "v_prediction"

Share = Callable[[], float]


def psnr(output: Tensor, image: Tensor) -> Tensor:
    """Mean peak signal to noise ratio in dB of pictures in [-1, 1]."""
    error = (output.detach().clamp(-1, 1) - image).square().mean((1, 2, 3)) / 4
    return (-10 * error.log10()).mean()


def autoencoder_loss(model: AutoencoderKL, pools: Sequence[PicturePool], batch: int) -> Loss:
    """Reconstruction, encoder and decoder together, by turns at the sizes of `pools`; `batch` is for 64 pixels."""
    weigh = AutoencoderLoss()

    def loss(step: int) -> dict[str, Tensor]:
        pool = pools[step % len(pools)]
        image = pool.batch(batch * SMALL // pool.size, step // len(pools))
        moments = model.encode(image)
        output = model.decode(sampled_latents(moments))
        divergence = weigh.divergence(moments)
        total = weigh.picture(output, image) + divergence
        return {"loss": total, "psnr": psnr(output, image), "kl": divergence.detach() / weigh.kl}

    return loss


def decoder_loss(model: AutoencoderKL, pool: PicturePool, batch: int) -> Loss:
    """Reconstruction from latents with a little noise, such as a UNet leaves; the encoder is frozen."""
    weigh = AutoencoderLoss()

    def loss(step: int) -> dict[str, Tensor]:
        image = pool.batch(batch, step)
        with torch.no_grad():
            latents = model.encode(image).chunk(2, dim=1)[0]
            noise = 0.15 * torch.rand(batch, 1, 1, 1) * torch.randn_like(latents)
        output = model.decode(latents + noise)
        return {"loss": weigh.picture(output, image), "psnr": psnr(output, image)}

    return loss


def text_loss(model: LatentDiffusion, cache: LatentCache, batch: int) -> Loss:
    """The slots alone."""

    def loss(step: int) -> dict[str, Tensor]:
        del step
        index = torch.randint(len(cache.ids), (batch,))
        ids = cache.ids[index, torch.randint(1 + VARIED, (batch,))].long()
        logits, slots = model.slots(model.text(ids).last), cache.slots[index]
        told = [0, 1, 3, 4, 6]  # a size is not always said
        right = torch.stack([(logits[i].argmax(1) == slots[:, i]) | (slots[:, i] < 0) for i in told]).all(0)
        return {"loss": slot_loss(logits, slots), "right": right.float().mean()}

    return loss


def diffusion_loss(model: LatentDiffusion, caches: Mapping[float, LatentCache], batch: int, varied: Share) -> Loss:
    """The weighted error of the velocity plus the slots'; each of `caches` gives its share of the batch.

    `varied`: the present share of varied captions, the others being canonical.
    """
    alpha_bars = torch.tensor(noise_schedule().alpha_bar, dtype=torch.float32)
    empty = tokenize([""], block_tokenizer()).ids[0, 0]

    def of_cache(cache: LatentCache, count: int) -> dict[str, Tensor]:
        x0, ids, slots = cache.batch(count, varied())
        dropped = torch.rand(count) < DROP
        ids[dropped], slots[dropped] = empty, -100
        blank_words(ids, slots, BLANK)
        t = stratified_timesteps(count, len(alpha_bars))
        alpha_bar = alpha_bars[t][:, None, None, None]
        eps = torch.randn_like(x0)
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        states = model.text(ids).last
        output = model.unet(x, t.float(), states)
        weight = min_snr_weight(PREDICTION, alpha_bar, GAMMA, floor=FLOOR)
        error = weight * (output - target(PREDICTION, x0, eps, alpha_bar)).square()
        noisy = error.detach()[alpha_bar.flatten() < 0.2].mean()
        read = slot_loss(model.slots(states), slots)
        return {"loss": error.mean() + SLOT_WEIGHT * read, "error": error.mean(), "noisy": noisy, "slots": read}

    def loss(step: int) -> dict[str, Tensor]:
        del step
        parts = [(share, of_cache(cache, round(share * batch))) for share, cache in caches.items()]
        return {name: torch.stack([share * part[name] for share, part in parts]).sum() for name in parts[0][1]}

    return loss


def folded_autoencoder(run: Path) -> AutoencoderKL:
    """The trained autoencoder with latents of mean 0 and variance 1 per channel, computed once and kept."""
    path = run / "folded.pt"
    model = AutoencoderKL(AUTOENCODER).eval()
    if not path.exists():
        model.load_state_dict(trained(run / "autoencoder"))
        drawn = scenes(4096, seed=4_000_000)
        with torch.no_grad():
            means = torch.cat([model.encode(render(drawn[i : i + 64], SMALL))[:, :4] for i in range(0, 4096, 64)])
            fold_statistics(model, means.mean((0, 2, 3)), means.std((0, 2, 3)))
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(memory_format=torch.channels_last)


def newest_autoencoder(run: Path) -> AutoencoderKL:
    """The autoencoder of the last of its stages that was run."""
    model = folded_autoencoder(run)
    for name in ("large_autoencoder", "decoder"):
        if any((run / name).glob("step-*.pt")):
            model.load_state_dict(trained(run / name))
            break
    return model


def trained(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of the newest checkpoint of a stage."""
    state = load_checkpoint(folder)
    if state is None:
        raise InputError(f"{folder} holds no checkpoint; run the stage `{folder.name}` first")
    weights: dict[str, Tensor] = state["ema"]
    return weights


def train_autoencoder(run: Path, minutes: float, batch: int) -> None:
    """Stage `autoencoder`."""
    rank, _ = join_ranks()
    torch.manual_seed(rank)
    plan = Plan(folder=run / "autoencoder", rate=2e-3, seconds=60 * minutes, decay=0.5, weight_decay=1e-4, ema=0.998)
    trainer = Trainer(AutoencoderKL(AUTOENCODER).to(memory_format=torch.channels_last), plan)
    pool = PicturePool(6144, SMALL, seed=1 + rank * 10**9 + trainer.step * 1013)
    trainer.run(autoencoder_loss(trainer.model, [pool], batch or 16))


def train_large_autoencoder(run: Path, minutes: float, batch: int) -> None:
    """Stage `large_autoencoder`: encoder and decoder go on, mostly at 128 pixels."""
    torch.manual_seed(3)
    model = folded_autoencoder(run)
    model.load_state_dict(trained(run / "decoder"))
    plan = Plan(folder=run / "large_autoencoder", rate=7e-4, seconds=60 * minutes, decay=0.6, weight_decay=1e-4)
    trainer = Trainer(model, plan)
    seed = 3_000_000_000 + trainer.step * 1013
    small, large = PicturePool(2048, SMALL, seed=seed), PicturePool(3072, SIZE, seed=seed + 500_000_000)
    trainer.run(autoencoder_loss(model, [large, small, large], batch or 16))


def train_decoder(run: Path, minutes: float, batch: int) -> None:
    """Stage `decoder`."""
    torch.manual_seed(1)
    model = folded_autoencoder(run)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    plan = Plan(folder=run / "decoder", rate=1e-3, seconds=60 * minutes, decay=0.6, weight_decay=1e-4)
    trainer = Trainer(model, plan)
    pool = PicturePool(6144, SMALL, seed=2_000_000_000 + trainer.step * 1013)
    trainer.run(decoder_loss(model, pool, batch or 16))


def train_text(run: Path, minutes: float, batch: int) -> None:
    """Stage `text`: needs captions only."""
    torch.manual_seed(2)
    drawn = scenes(12_000, seed=3_000_000, single=0.35)
    require_train(drawn)
    ids = caption_ids(drawn, 1, block_tokenizer())
    cache = LatentCache(latents=torch.zeros(0), ids=ids, slots=scene_slots(drawn))
    model = LatentDiffusion(resnets=1)
    model.unet.requires_grad_(False)
    plan = Plan(folder=run / "text", rate=1e-3, seconds=60 * minutes, ema=0.99)
    Trainer(model, plan).run(text_loss(model, cache, batch or 128))


def write_latents(run: Path, first: int, last: int, size: int) -> None:
    """Stage `latents`: chunks `first` to `last`, the last not included.

    They go to `latents`, or once there is a `large_autoencoder`, to `latents-<size>`.
    """
    large = (run / "large_autoencoder").exists()
    folder = run / (f"latents-{size}" if large else "latents")
    folder.mkdir(parents=True, exist_ok=True)
    model = newest_autoencoder(run)
    for number in range(first, last):
        write_chunk(model, folder, number, size)


def train_small_unet(run: Path, minutes: float, batch: int) -> None:
    """Stage `small_unet`: text tower and a UNet with 1 residual block a level, from the slots' text tower."""
    model = LatentDiffusion(resnets=1)
    model.load_state_dict(trained(run / "text"))
    caches = {1.0: LatentCache.read(run / "latents")}
    trainer = joined(model, Plan(folder=run / "small_unet", rate=1e-3, seconds=60 * minutes, decay=0.0))
    trainer.run(diffusion_loss(model, caches, batch or 32, lambda: 0.0))


def train_unet(run: Path, minutes: float, batch: int) -> None:
    """Stage `unet`: the same with 2 residual blocks a level, grown from the small one."""
    model = LatentDiffusion()
    grow(model, trained(run / "small_unet"))
    caches = {1.0: LatentCache.read(run / "latents")}
    trainer = joined(model, Plan(folder=run / "unet", rate=1e-3, seconds=60 * minutes, decay=0.25))
    trainer.run(diffusion_loss(model, caches, batch or 32, lambda: 0.7 * min(1.0, trainer.progress / 0.15)))


def train_large_unet(run: Path, minutes: float, batch: int) -> None:
    """Stage `large_unet`: goes on at 128 pixels, with some at 64."""
    model = LatentDiffusion()
    model.load_state_dict(trained(run / "unet"))
    caches = {0.8: LatentCache.read(run / "latents-128"), 0.2: LatentCache.read(run / "latents-64")}
    trainer = joined(model, Plan(folder=run / "large_unet", rate=8e-4, seconds=60 * minutes, decay=0.4))
    trainer.run(diffusion_loss(model, caches, batch or 20, lambda: 0.7))


def joined(model: LatentDiffusion, plan: Plan) -> Trainer[LatentDiffusion]:
    """A trainer with random numbers of its rank's own."""
    rank, _ = join_ranks()
    torch.manual_seed(rank)
    return Trainer(model, plan)


def export(run: Path, folder: Path) -> None:
    """Stage `export`: a diffusers folder in half precision, from the averaged weights; a model card there stays."""
    model = LatentDiffusion()
    model.load_state_dict(trained(run / "large_unet"))
    parts = Parts(
        name="blocks-base",
        family="blocks",
        unet=model.unet,
        autoencoder=newest_autoencoder(run),
        text_encoders=(model.text,),
        tokenizers=(block_tokenizer(),),
        scheduler=SchedulerConfig(
            sampler=DEFAULTS.sampler, prediction=PREDICTION, spacing=DEFAULTS.schedule, steps_offset=1, final="zero"
        ),
        defaults=DEFAULTS,
        licence="Apache-2.0",
    )
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    save_parts(parts, folder, torch.float16)
    card.write_text(text, encoding="utf-8")


STAGES = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "decoder": train_decoder,
    "small_unet": train_small_unet,
    "unet": train_unet,
    "large_autoencoder": train_large_autoencoder,
    "large_unet": train_large_unet,
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "latents", "export"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=0, help="of each rank; 0 for the stage's own")
    parser.add_argument("--chunks", type=int, nargs=2, default=(0, 8), metavar=("FIRST", "LAST"))
    parser.add_argument("--size", type=int, default=SMALL, help="of the pictures whose latents are written")
    parser.add_argument("--folder", type=Path, default=Path("src/fewstep/assets/blocks-base"))
    arguments = parser.parse_args()
    if arguments.stage == "latents":
        write_latents(arguments.run_dir, *arguments.chunks, arguments.size)
    elif arguments.stage == "export":
        export(arguments.run_dir, arguments.folder)
    else:
        STAGES[arguments.stage](arguments.run_dir, arguments.minutes, arguments.batch)
        leave_ranks()


if __name__ == "__main__":
    main()
