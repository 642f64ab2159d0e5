"""blocks-base: the embedded latent diffusion model, trained on blockworld."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.blockworld import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scenes,
    captions,
    render,
    require_train,
    scenes,
    vocabulary,
)
from fewstep.diffusion.schedule import noise_schedule
from fewstep.errors import InputError
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer, word_tokenizer
from fewstep.train.checkpoint import load_checkpoint
from fewstep.train.fold import fold_statistics
from fewstep.train.loop import Loss, Plan, Trainer
from fewstep.train.losses import AutoencoderLoss, min_snr_weight, sampled_latents, stratified_timesteps, target
from fewstep.train.parallel import join_ranks

SIZE = 64
WINDOW = 24
CHUNK = 8192
VARIED = 5  # varied captions a scene, beside the canonical one
DROP = 0.1  # share of captions left out, for classifier-free guidance
SLOT_WEIGHT = 0.1
FLOOR, GAMMA = 1.0, 5.0  # limits of the weight of an error in x0
PREDICTION = "v_prediction"

AUTOENCODER = AutoencoderConfig(channels=(16, 32, 64, 64), resnets=1, groups=8, scaling_factor=1.0)
TEXT = TextConfig(
    vocabulary=len(vocabulary()) + 4, window=WINDOW, width=128, layers=2, heads=4, inner=512, activation="gelu", eos=2
)


def unet_config(resnets: int) -> UNetConfig:
    """The UNet with 1 or 2 residual blocks a level: it starts small and is grown."""
    stages = (Stage(channels=64, resnets=resnets, depth=1, heads=4), Stage(channels=128, resnets=resnets, depth=1, heads=4))
    return UNetConfig(stages=stages, context=TEXT.width, groups=16)


SLOTS = (len(COLOURS), len(SHAPES), len(SIZES)) * 2 + (len(RELATIONS),)


def block_tokenizer() -> Tokenizer:
    """The words of blockworld, in a window of 24."""
    return word_tokenizer(vocabulary(), WINDOW)


class PicturePool:
    """Rendered training pictures (uint8), a part of which is drawn anew every `refresh_steps` steps."""

    def __init__(self, count: int, *, seed: int, refresh: int = 256, refresh_steps: int = 100) -> None:
        self.seed, self.refresh, self.refresh_steps = seed, refresh, refresh_steps
        self.pictures = self._rendered(count, 0)

    def batch(self, count: int, step: int) -> Tensor:
        """(count, 3, 64, 64) in [-1, 1], colour channels permuted in half of the batches.

        The permutation keeps unseen pairs of colour and shape within the autoencoder's reach.
        """
        if step % self.refresh_steps == 0:
            places = torch.randperm(len(self.pictures))[: self.refresh]
            self.pictures[places] = self._rendered(self.refresh, step + 1)
        image = self.pictures[torch.randint(len(self.pictures), (count,))].float() / 127.5 - 1
        if torch.rand(()) < 0.5:
            image = image[:, torch.randperm(3)]
        return image.contiguous(memory_format=torch.channels_last)

    def _rendered(self, count: int, step: int) -> Tensor:
        drawn = scenes(count, seed=self.seed + step * 1009)
        require_train(drawn)
        return ((render(drawn, SIZE) + 1) * 127.5).round().byte()


def psnr(output: Tensor, image: Tensor) -> Tensor:
    """Mean peak signal to noise ratio in dB of pictures in [-1, 1]."""
    error = (output.detach().clamp(-1, 1) - image).square().mean((1, 2, 3)) / 4
    return (-10 * error.log10()).mean()


def autoencoder_loss(model: AutoencoderKL, pool: PicturePool, batch: int) -> Loss:
    """Reconstruction, encoder and decoder together."""
    weigh = AutoencoderLoss()

    def loss(step: int) -> dict[str, Tensor]:
        image = pool.batch(batch, step)
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


class SlotReader(nn.Module):
    """Tells colour, shape and size of both objects and their relation from the text states; trains the text tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in SLOTS)

    def forward(self, states: Tensor) -> list[Tensor]:
        """states (B, N, width) -> logits (B, values) of each slot."""
        queries = self.queries.expand(len(states), -1, -1)
        read = self.attention(queries, states, states, need_weights=False)[0]
        return [head(read[:, i]) for i, head in enumerate(self.heads)]


def slot_loss(logits: list[Tensor], slots: Tensor) -> Tensor:
    """Mean cross-entropy; slots (B, 7) are -100 where the caption says nothing."""
    losses = [F.cross_entropy(logit, slots[:, i], reduction="sum", ignore_index=-100) for i, logit in enumerate(logits)]
    return torch.stack(losses).sum() / (slots >= 0).sum().clamp(min=1)


def scene_slots(drawn: Scenes) -> Tensor:
    """(B, 7) int64: colour, shape, size of object 0, of object 1 (-100 where absent), then the relation."""
    slots = torch.stack([drawn.colour, drawn.shape, drawn.size], dim=2)
    slots[drawn.count == 1, 1] = -100
    return torch.cat([slots.flatten(1), drawn.relation[:, None]], dim=1)


class LatentDiffusion(nn.Module):
    """What is trained together: the text tower, the UNet, and the slots that keep the text tower honest."""

    def __init__(self, resnets: int = 2) -> None:
        super().__init__()
        self.text = TextEncoder(TEXT)
        self.slots = SlotReader(TEXT.width)
        self.unet = UNet(unet_config(resnets))


@torch.no_grad()
def grow(large: LatentDiffusion, small: Mapping[str, Tensor]) -> None:
    """Give `large`, with 2 residual blocks a level, the weights of a model with 1 and exactly its function.

    Each level's second block on the way down, and its middle one on the way up, starts as the identity.
    """
    moved = {re.sub(r"(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", name): value for name, value in small.items()}
    large.load_state_dict(moved, strict=False)
    for block in (*large.unet.down_blocks, *large.unet.up_blocks):
        nn.init.zeros_(block.attentions[1].proj_out.weight)
        nn.init.zeros_(block.attentions[1].proj_out.bias)
        nn.init.zeros_(block.resnets[1].conv2.weight)
        nn.init.zeros_(block.resnets[1].conv2.bias)
    for block in large.unet.up_blocks:  # where the shortcut drops the skip connection
        nn.init.zeros_(block.resnets[1].conv_shortcut.bias)
        nn.init.dirac_(block.resnets[1].conv_shortcut.weight)


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Encoded scenes: latents (N, 4, 8, 8), caption ids (N, 1 + VARIED, 24) uint8, slots (N, 7)."""

    latents: Tensor
    ids: Tensor
    slots: Tensor

    @classmethod
    def read(cls, folder: Path) -> LatentCache:
        """All chunks in `folder`."""
        chunks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("chunk-*.pt"))]
        if not chunks:
            raise InputError(f"{folder} holds no latents; run the stage `latents` first")
        return cls(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in ("latents", "ids", "slots")})


def caption_ids(drawn: Scenes, seed: int, tokenizer: Tokenizer) -> Tensor:
    """(B, 1 + VARIED, 24) uint8: the canonical caption, then varied ones."""
    said = [captions(drawn, seed=seed, style="canonical")]
    said += [captions(drawn, seed=seed * 64 + i, style="varied") for i in range(1, VARIED + 1)]
    return torch.stack([tokenize(texts, tokenizer).ids[:, 0] for texts in said], dim=1).byte()


def write_chunk(model: AutoencoderKL, folder: Path, number: int) -> None:
    """Encode `CHUNK` scenes, once."""
    path = folder / f"chunk-{number:03d}.pt"
    if path.exists():
        return
    drawn = scenes(CHUNK, seed=5_000_000 + number, single=0.35)
    require_train(drawn)
    with torch.inference_mode():
        means = [model.encode(render(drawn[i : i + 64], SIZE)).chunk(2, dim=1)[0] for i in range(0, CHUNK, 64)]
    ids = caption_ids(drawn, number, block_tokenizer())
    chunk = {"latents": torch.cat(means).contiguous(), "ids": ids, "slots": scene_slots(drawn)}
    partial_path = path.with_suffix(".partial")
    torch.save(chunk, partial_path)
    partial_path.replace(path)


def folded_autoencoder(run: Path) -> AutoencoderKL:
    """The trained autoencoder with latents of mean 0 and variance 1 per channel, computed once and kept."""
    path = run / "folded.pt"
    model = AutoencoderKL(AUTOENCODER).eval()
    if not path.exists():
        model.load_state_dict(trained(run / "autoencoder"))
        drawn = scenes(4096, seed=4_000_000)
        with torch.no_grad():
            means = torch.cat([model.encode(render(drawn[i : i + 64], SIZE))[:, :4] for i in range(0, 4096, 64)])
            fold_statistics(model, means.mean((0, 2, 3)), means.std((0, 2, 3)))
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(memory_format=torch.channels_last)


def decoding_autoencoder(run: Path) -> AutoencoderKL:
    """The autoencoder with the polished decoder where there is one."""
    model = folded_autoencoder(run)
    if any((run / "decoder").glob("step-*.pt")):
        model.load_state_dict(trained(run / "decoder"))
    return model


def trained(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of the newest checkpoint of a stage."""
    state = load_checkpoint(folder)
    if state is None:
        raise InputError(f"{folder} holds no checkpoint; run the stage `{folder.name}` first")
    weights: dict[str, Tensor] = state["ema"]
    return weights


def diffusion_loss(model: LatentDiffusion, cache: LatentCache, batch: int, progress: Callable[[], float]) -> Loss:
    """The weighted error of the velocity, plus the slots'; canonical captions first, then more and more varied ones."""
    alpha_bars = torch.tensor(noise_schedule().alpha_bar, dtype=torch.float32)
    empty = tokenize([""], block_tokenizer()).ids[0, 0]

    def loss(step: int) -> dict[str, Tensor]:
        del step
        index = torch.randint(len(cache.latents), (batch,))
        varied = torch.rand(batch) < 0.7 * min(1.0, progress() / 0.15)
        ids = cache.ids[index, torch.randint(1, 1 + VARIED, (batch,)) * varied].long()
        slots = cache.slots[index]
        dropped = torch.rand(batch) < DROP
        ids[dropped], slots[dropped] = empty, -100

        x0 = cache.latents[index]
        t = stratified_timesteps(batch, len(alpha_bars))
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


def train_autoencoder(run: Path, minutes: float, batch: int) -> None:
    """Stage `autoencoder`."""
    rank, _ = join_ranks()
    torch.manual_seed(rank)
    plan = Plan(folder=run / "autoencoder", rate=2e-3, seconds=60 * minutes, decay=0.5, weight_decay=1e-4, ema=0.998)
    trainer = Trainer(AutoencoderKL(AUTOENCODER).to(memory_format=torch.channels_last), plan)
    pool = PicturePool(6144, seed=1 + rank * 10**9 + trainer.step * 1013)
    trainer.run(autoencoder_loss(trainer.model, pool, batch or 16))


def train_decoder(run: Path, minutes: float, batch: int) -> None:
    """Stage `decoder`."""
    torch.manual_seed(1)
    model = folded_autoencoder(run)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    plan = Plan(folder=run / "decoder", rate=1e-3, seconds=60 * minutes, decay=0.6, weight_decay=1e-4)
    trainer = Trainer(model, plan)
    pool = PicturePool(6144, seed=2_000_000_000 + trainer.step * 1013)
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


def write_latents(run: Path, first: int, last: int) -> None:
    """Stage `latents`: chunks `first` to `last`, the last not included."""
    (run / "latents").mkdir(parents=True, exist_ok=True)
    model = folded_autoencoder(run)
    for number in range(first, last):
        write_chunk(model, run / "latents", number)


def train_small_unet(run: Path, minutes: float, batch: int) -> None:
    """Stage `small_unet`: text tower and a UNet with 1 residual block a level, from the slots' text tower."""
    model = LatentDiffusion(resnets=1)
    model.load_state_dict(trained(run / "text"))
    fit_unet(model, run, Plan(folder=run / "small_unet", rate=1e-3, seconds=60 * minutes, decay=0.0), batch)


def train_unet(run: Path, minutes: float, batch: int) -> None:
    """Stage `unet`: the same with 2 residual blocks a level, grown from the small one."""
    model = LatentDiffusion()
    grow(model, trained(run / "small_unet"))
    fit_unet(model, run, Plan(folder=run / "unet", rate=1e-3, seconds=60 * minutes, decay=0.25), batch)


def fit_unet(model: LatentDiffusion, run: Path, plan: Plan, batch: int) -> None:
    """Train on the cached latents; `batch` is that of each rank."""
    rank, _ = join_ranks()
    torch.manual_seed(rank)
    trainer = Trainer(model, plan)
    cache = LatentCache.read(run / "latents")
    trainer.run(diffusion_loss(model, cache, batch or 32, lambda: trainer.progress))


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("autoencoder", "text", "latents", "small_unet", "unet", "decoder"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=0, help="of each rank; 0 for the stage's own")
    parser.add_argument("--chunks", type=int, nargs=2, default=(0, 8), metavar=("FIRST", "LAST"))
    arguments = parser.parse_args()
    stages = {
        "autoencoder": train_autoencoder,
        "text": train_text,
        "small_unet": train_small_unet,
        "unet": train_unet,
        "decoder": train_decoder,
    }
    if arguments.stage == "latents":
        write_latents(arguments.run_dir, *arguments.chunks)
    else:
        stages[arguments.stage](arguments.run_dir, arguments.minutes, arguments.batch)


if __name__ == "__main__":
    main()
