"""blocks-base: the embedded latent diffusion model, trained on blockworld.

    fewstep train recipes/blocks_base.py --out runs/blocks-base
    torchrun --nproc-per-node 2 -m fewstep train recipes/blocks_base.py --out runs/blocks-base

The last stage leaves the model in `runs/blocks-base/large_unet/model`.

Hardware: 2 shared cores of an AMD EPYC (Zen 5, AVX-512), float32, no GPU; under three hours. Score of the shipped
weights by `python -m benchmarks.blocks_exam` on held-out scenes, n = 200 each, guidance 3.5, 10 DDIM steps at 128
pixels: one object and its size 0.865, two and their relation 0.935. The autoencoder's own round trip is 1.000 and
1.000. Those weights had words blanked in the second half of the last stage only, and its warmup twice.

What probably mattered: weights that keep the noisiest levels in the loss (`FLOOR`), and a text tower that knows the
slots from the start. Relations and their direction were right after 50,000 samples; a prototype with plain min-SNR
weights, smaller objects and another world had not learned directions in 116,000. They were not varied one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blocks_data import (
    SIZE,
    SMALL,
    LatentCache,
    blank_words,
    block_tokenizer,
    caption_ids,
    layout_on,
    permuted_pictures,
    read_once,
    scene_slots,
    write_latents,
)
from blocks_model import AUTOENCODER, DEFAULTS, LatentDiffusion, grow, slot_loss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.blockworld import Scenes, render, require_train, scenes
from fewstep.engines.device import choose_device
from fewstep.errors import InputError
from fewstep.files import partial_path
from fewstep.models.autoencoder import AutoencoderKL, Posterior
from fewstep.models.networks import Networks
from fewstep.models.zoo import CATALOGUE
from fewstep.text.prompt import tokenize
from fewstep.train.forward_process import ForwardProcess
from fewstep.train.losses import AutoencoderLoss, min_snr_weight, stratified_timesteps
from fewstep.train.normalize_latents import normalize_latents
from fewstep.train.plan import MicroBatch, Plan, mixed_seed
from fewstep.train.stages import RecipeStage, StageSetup
from fewstep.train.trainer import Loss, Objective, Trainer
from fewstep.weights.load import load_model
from fewstep.weights.model import LoadedModel
from fewstep.weights.save import save_model
from fewstep.weights.scheduler import SchedulerConfig

DROP = 0.1  # share of captions left out, for classifier-free guidance
BLANK = 0.15  # share of captions whose colours are left out, and of those whose shapes are
SLOT_WEIGHT = 0.1
FLOOR, GAMMA = 1.0, 5.0  # limits of the weight of an error in x0
WEIGHTS = "weights.safetensors"


def stages(out: Path) -> Sequence[RecipeStage]:
    """The stages in their order; each begins with what the one before left."""

    def run(name: str, task: Autoencoder | Text | Diffusion, minutes: float, **options: object) -> RecipeStage:
        return RecipeStage(task=task, plan=Plan(folder=out / name, seconds=60 * minutes, **options))  # type: ignore[arg-type]

    pictures = {"weight_decay": 1e-4, "batch_size": 16}
    latents = {"learning_rate": 1e-3, "lr_decay_fraction": 0.0, "batch_size": 64}
    large = {SIZE: 0.8, SMALL: 0.2}
    return [
        run("autoencoder", Autoencoder(), 18, learning_rate=2e-3, lr_decay_fraction=0.5, ema_decay=0.998, **pictures),
        run("text", Text(), 0.7, learning_rate=1e-3, ema_decay=0.99, batch_size=128),
        run(
            "decoder",
            Autoencoder(start=out / "autoencoder", decoder=True),
            11,
            learning_rate=1e-3,
            lr_decay_fraction=0.6,
            **pictures,
        ),
        run("small_unet", Diffusion(start=out / "text", autoencoder=out / "decoder", resnets=1), 11, **latents),
        run("unet", Diffusion(start=out / "small_unet", autoencoder=out / "decoder", varied=0.7), 27, **latents),
        run(
            "large_autoencoder",
            Autoencoder(start=out / "decoder", sizes=(SIZE, SMALL, SIZE)),
            13,
            learning_rate=7e-4,
            lr_decay_fraction=0.6,
            **pictures,
        ),
        run(
            "large_unet",
            Diffusion(start=out / "unet", autoencoder=out / "large_autoencoder", sizes=large, varied=0.7, blank=BLANK),
            99,
            learning_rate=8e-4,
            lr_decay_fraction=0.4,
            batch_size=40,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Reconstruction, by turns at `sizes`; the batch is for 64 pixels.

    `start`: the stage, or the model, to go on from. `decoder`: the decoder alone, from latents with a little noise such
    as a UNet leaves. The latents of a first stage get mean 0 and variance 1, channel by channel. `edges`: the weight of
    the differences between neighbouring pixels.
    """

    start: Path | str | None = None
    sizes: tuple[int, ...] = (SMALL,)
    decoder: bool = False
    edges: float = 0.5
    device: str | None = None

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        torch.manual_seed(plan.seed)
        device = choose_device(self.device)
        model = AutoencoderKL(AUTOENCODER).to(memory_format=layout_on(device))
        if self.start is not None:
            model.load_state_dict(autoencoder_weights(self.start))
        model.to(device)
        if self.decoder:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)
        objective = Objective(network=model, loss=self._loss(model, device), kind=self._size)
        return StageSetup(objectives={"model": objective}, finish=self._finish(model, plan.folder))

    def _size(self, micro_batch: MicroBatch) -> int:
        """Of the pictures of a step."""
        return self.sizes[micro_batch.step % len(self.sizes)]

    def _loss(self, model: AutoencoderKL, device: torch.device) -> Loss:
        weigh = AutoencoderLoss(edges=self.edges)

        def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            size = self._size(micro_batch)
            micro_batch = smaller(micro_batch, SMALL / size).on(device)
            image = permuted_pictures(micro_batch, size)
            moments = model.encode(image).float()
            latents = noisy_mean(moments.detach(), micro_batch) if self.decoder else sampled(Posterior.of(moments))
            output = model.decode(latents).float()
            terms = {"psnr": psnr(output, image)}
            if self.decoder:
                return terms | {"loss": weigh.picture(output, image)}
            divergence = weigh.divergence(moments)
            return terms | {"loss": weigh.picture(output, image) + divergence, "kl": divergence / weigh.kl}

        return loss

    def _finish(self, model: AutoencoderKL, folder: Path) -> Callable[[Trainer], None]:
        def finish(trainer: Trainer) -> None:
            averaged = trainer.averaged("model")
            if trainer.rank == 0:
                model.load_state_dict(averaged)
                if self.start is None:
                    fold(model)
                save_weights(model, folder)

        return finish


@dataclass(frozen=True, kw_only=True)
class Text:
    """The slots alone: needs captions and no pictures."""

    captions: int = 12_000
    device: str | None = None

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        torch.manual_seed(plan.seed)
        drawn = scenes(self.captions, seed=mixed_seed("captions"), single=0.35)
        require_train(drawn)
        cache = LatentCache(
            latents=torch.zeros(len(drawn), 0), ids=caption_ids(drawn, 1, block_tokenizer()), slots=scene_slots(drawn)
        )
        device = choose_device(self.device)
        model = LatentDiffusion(resnets=1).to(device)
        model.unet.requires_grad_(False)

        def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            ids, slots = (value.to(device) for value in cache.words(micro_batch, varied=0.8)[1:])
            logits = model.slots(model.text(ids).last)
            always_in_caption = [0, 1, 3, 4, 6]  # a size is not always said
            right = torch.stack(
                [(logits[i].argmax(1) == slots[:, i]) | (slots[:, i] < 0) for i in always_in_caption]
            ).all(0)
            return {"loss": slot_loss(logits, slots), "right": right.float().mean()}

        return StageSetup(objectives={"model": Objective(network=model, loss=loss)}, finish=saved(model))


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Text tower and UNet together: the weighted error of the velocity, and the slots'.

    `start`: the stage, or the model, to go on from; a UNet with fewer residual blocks is grown. `sizes`: the share of
    the batch that is of each picture size; or `size_cycle`: the sizes of whole batches, step after step. `varied`:
    the share of varied captions after the first seventh of the run. `blank`: see `blank_words`. `chunks` of latents are
    encoded first where they are not there: so many at 64 pixels, or `small_chunks`, and of larger pictures more.
    """

    start: Path | str
    autoencoder: Path | str
    resnets: int = 2
    sizes: Mapping[int, float] | None = None
    size_cycle: tuple[int, ...] = ()
    varied: float = 0.0
    blank: float = 0.0
    chunks: int = 10
    small_chunks: int | None = None
    device: str | None = None

    def prepare(self, plan: Plan) -> StageSetup:
        """See `fewstep.train.stages.TrainingTask`."""
        device = choose_device(self.device)
        model = self._model().to(device)
        autoencoder = AutoencoderKL(AUTOENCODER).eval().to(device, memory_format=layout_on(device))
        autoencoder.load_state_dict(autoencoder_weights(self.autoencoder))
        shares = self.sizes or dict.fromkeys(self.size_cycle or (SMALL,), 1.0)
        losses = {size: self._loss(model, self._cache(autoencoder, size, plan.folder.parent)) for size in shares}

        def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            if self.size_cycle:
                return losses[self._size(micro_batch)](micro_batch)
            parts = [(share, losses[size](smaller(micro_batch, share))) for size, share in shares.items()]
            return {name: torch.stack([share * terms[name] for share, terms in parts]).sum() for name in parts[0][1]}

        def finish(trainer: Trainer) -> None:
            saved(model)(trainer)
            if trainer.rank == 0:
                save_model(model_of(model, autoencoder), plan.folder / "model", torch.float16)

        return StageSetup(objectives={"model": Objective(network=model, loss=loss, kind=self._size)}, finish=finish)

    def _size(self, micro_batch: MicroBatch) -> int:
        """Of the pictures of a step; 0 where each has pictures of all sizes."""
        return self.size_cycle[micro_batch.step % len(self.size_cycle)] if self.size_cycle else 0

    def _model(self) -> LatentDiffusion:
        """As the stage before left it; of a shipped model the slots, which are not shipped, are new."""
        model = LatentDiffusion(self.resnets)
        if is_model(self.start):
            start = load_model(self.start, dtype=torch.float32).networks
            model.text.load_state_dict(start.text_encoders[0].state_dict())
            model.unet.load_state_dict(start.unet.state_dict())
        elif Path(self.start).name == "small_unet":
            grow(model, weights_of(Path(self.start)))
        else:
            model.load_state_dict(weights_of(Path(self.start)))
        return model

    def _cache(self, autoencoder: AutoencoderKL, size: int, out: Path) -> LatentCache:
        folder = out / f"latents-{Path(self.autoencoder).name}-{size}"
        chunks = self.chunks if size > SMALL or self.small_chunks is None else self.small_chunks
        write_latents(autoencoder, folder, chunks * size // SMALL, size)
        return read_once(folder)

    def _loss(self, model: LatentDiffusion, cache: LatentCache) -> Loss:
        process, empty = ForwardProcess(prediction="v_prediction"), tokenize([""], block_tokenizer()).ids[0, 0]
        device = model.unet.conv_in.weight.device
        latents = cache.latents.to(device)

        def words(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            index, ids, slots = cache.words(micro_batch, self.varied * min(1.0, micro_batch.step / 500))
            dropped = micro_batch.rand("drop") < DROP
            ids[dropped], slots[dropped] = empty, -100
            blank_words(ids, slots, micro_batch.rand("blank", 2), self.blank)
            return {"index": index, "ids": ids, "slots": slots}

        def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            micro_batch = micro_batch.on(device)
            read = micro_batch.inputs(words)
            x0 = latents[read["index"]]
            t = micro_batch.rows("t", lambda count, generator: stratified_timesteps(count, process.steps, generator))
            eps = micro_batch.randn("noise", *x0.shape[1:])
            states = model.text(read["ids"]).last
            output = model.unet(process.noised(x0, eps, t), t.float(), states)
            weight = min_snr_weight(process.prediction, process.alpha_bar(t), GAMMA, floor=FLOOR)
            error = (weight * (output - process.target(x0, eps, t)).square()).mean()
            slots = slot_loss(model.slots(states), read["slots"])
            return {"loss": error + SLOT_WEIGHT * slots, "error": error, "slots": slots}

        return loss


def smaller(micro_batch: MicroBatch, share: float) -> MicroBatch:
    """A part of a batch of `share` of the size, shared out alike."""
    counts = [round(share * number) for number in (micro_batch.whole, micro_batch.first, micro_batch.count)]
    return replace(micro_batch, whole=counts[0], first=counts[1], count=counts[2])


def sampled(posterior: Posterior) -> Tensor:
    """Latents (B, C, h, w) drawn with the global random numbers, which a trainer seeds for each step."""
    return posterior.sample(torch.randn_like(posterior.mean))


def noisy_mean(moments: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The means of moments (B, 2C, h, w) with up to 0.15 of noise."""
    mean = moments.chunk(2, dim=1)[0]
    return mean + 0.15 * micro_batch.rand("amount", 1, 1, 1) * micro_batch.randn("noise", *mean.shape[1:])


def psnr(output: Tensor, image: Tensor) -> Tensor:
    """Mean peak signal to noise ratio in dB of pictures in [-1, 1]."""
    error = (output.detach().clamp(-1, 1) - image).square().mean((1, 2, 3)) / 4
    return (-10 * error.log10()).mean()


@torch.no_grad()
def fold(model: AutoencoderKL) -> None:
    """Give the latents mean 0 and variance 1, channel by channel."""
    device, drawn = next(model.parameters()).device, scenes(4096, seed=mixed_seed("fold"))
    drawn = Scenes(**{name: value.to(device) for name, value in drawn.tensors().items()})
    mean = torch.cat([model.encode(render(drawn[i : i + 64], SMALL))[:, :4] for i in range(0, 4096, 64)])
    normalize_latents(model, mean.mean((0, 2, 3)), mean.std((0, 2, 3)))


def autoencoder_weights(start: Path | str) -> dict[str, Tensor]:
    """What a stage left, or those of a model's autoencoder."""
    if not is_model(start):
        return weights_of(Path(start))
    return load_model(start, dtype=torch.float32).networks.autoencoder.state_dict()


def is_model(start: Path | str) -> bool:
    """Whether it is an embedded model's name or a model's folder, and not a stage's."""
    return str(start) in CATALOGUE or (Path(start) / "model_index.json").is_file()


def weights_of(stage: Path) -> dict[str, Tensor]:
    """What a stage left."""
    if not (stage / WEIGHTS).is_file():
        raise InputError(f"{stage} holds no {WEIGHTS}; train the stage `{stage.name}` first")
    return load_file(stage / WEIGHTS)


def save_weights(network: nn.Module, folder: Path) -> None:
    """Leave the weights for the stages after this one."""
    with partial_path(folder / WEIGHTS) as partial:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, partial)


def saved(network: nn.Module) -> Callable[[Trainer], None]:
    """A stage's end: the averaged weights, in the network and on the disk."""

    def finish(trainer: Trainer) -> None:
        averaged = trainer.averaged("model")
        if trainer.rank == 0:
            network.load_state_dict(averaged)
            save_weights(network, trainer.plan.folder)

    return finish


def model_of(model: LatentDiffusion, autoencoder: AutoencoderKL) -> LoadedModel:
    """The model as it is shipped."""
    return LoadedModel.of(
        Networks(
            unet=model.unet,
            autoencoder=autoencoder,
            text_encoders=(model.text,),
        ),
        (block_tokenizer(),),
        name="blocks-base",
        family="blocks",
        scheduler=SchedulerConfig(
            sampler=DEFAULTS.sampler,
            prediction="v_prediction",
            spacing=DEFAULTS.schedule,
            steps_offset=1,
            final="zero",
        ),
        defaults=DEFAULTS,
        licence="Apache-2.0",
    )
