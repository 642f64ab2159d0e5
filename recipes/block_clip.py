"""block-clip: the two towers that give block pictures a CLIP score and features; see `fewstep.blockworld.clip`.

    fewstep train recipes/block_clip.py

1000 steps of 96, about 4 minutes of one CPU core (Zen 5), 2 GB. The weights, for src/fewstep/assets/block-readers, are
written below the run's folder, and their scores printed.

Contrast alone leaves a bag of words: each picture is told from three captions too that differ from its own in one
thing, an attribute, two exchanged shapes, a turned-round or another relation; and what either tower gives must tell the
scene. Training scenes only. Score: see the card beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from second_reader import bytes_of, recoloured, soft
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.blockworld import COLOURS, RELATIONS, SHAPES, SIZES, Scenes, captions, render, require_train, scenes
from fewstep.blockworld.backbone import SIDE
from fewstep.blockworld.clip import EMBEDDING, TEXT, ImageTower, block_tokenizer
from fewstep.blockworld.scene import LEFT, RIGHT
from fewstep.models.text_encoder import TextEncoder
from fewstep.text.prompt import tokenize
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.stages import RecipeStage, StageSetup
from fewstep.train.trainer import Loss, Objective, Trainer
from fewstep.weights.auxiliary import save_network

SEED = 9_000_000_000  # no other recipe draws scenes from here on
SLOTS = (len(COLOURS), len(SHAPES), len(SIZES)) * 2 + (len(RELATIONS),)
SPREAD = 2000  # pictures over which features are evened out
WRONG = 3  # captions a picture that differ in one thing
LONGEST = 16  # tokens of a caption, start and end among them
SLOT_WEIGHT = 0.3  # weight of what the towers say of the scene
NEVER = -1e4


class Towers(nn.Module):
    """What is trained together: the towers, how sharp their contrast is, and what keeps them honest."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ImageTower(), TextEncoder(TEXT)
        self.sharpness = nn.Parameter(torch.tensor(2.5))
        self.seen, self.said = _telling(), _telling()


def _telling() -> nn.Sequential:
    return nn.Sequential(nn.Linear(EMBEDDING, 128), nn.ReLU(), nn.Linear(128, sum(SLOTS)))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pictures (N, 3, 64, 64) uint8, captions (N, 2, 16), wrong ones (N, 3, 16), and slots: (N, 7), (N, 3, 7)."""

    pictures: Tensor
    right: Tensor
    wrong: Tensor
    slots: Tensor
    wrong_slots: Tensor


def drawn(count: int, seed: int) -> Pairs:
    """Fresh pairs."""
    batch = scenes(count, seed=SEED + seed, single=0.3)
    require_train(batch)
    generator = torch.Generator().manual_seed(SEED + seed)
    others = [mistaken(batch, generator) for _ in range(WRONG)]
    return Pairs(
        pictures=bytes_of(render(batch, SIDE)),
        right=torch.stack([ids_of(captions(batch, seed=seed, style=style)) for style in ("canonical", "varied")], 1),
        wrong=torch.stack(
            [ids_of(captions(other, seed=seed + i, style="varied")) for i, other in enumerate(others)], 1
        ),
        slots=slots_of(batch),
        wrong_slots=torch.stack([slots_of(other) for other in others], 1),
    )


def ids_of(texts: list[str]) -> Tensor:
    """(B, 16): what comes after the end says nothing to a tower that looks back only."""
    return tokenize(texts, TOKENIZER).ids[:, 0, :LONGEST]


def mistaken(batch: Scenes, generator: torch.Generator) -> Scenes:
    """The scenes with one thing wrong; they may be such as are never drawn, and only give captions."""
    count, pair = len(batch), batch.count == 2
    rows = torch.arange(count)
    which = torch.randint(2, (count,), generator=generator) * pair
    kind = torch.where(
        pair, torch.randint(6, (count,), generator=generator), torch.randint(2, (count,), generator=generator)
    )
    shape, colour, relation = batch.shape.clone(), batch.colour.clone(), batch.relation.clone()
    move = lambda values: torch.randint(1, values, (count,), generator=generator)  # noqa: E731
    other = (shape[rows, which] + move(len(SHAPES))) % len(SHAPES)
    shape[rows, which] = torch.where(kind == 0, other, shape[rows, which])
    other = (colour[rows, which] + move(len(COLOURS))) % len(COLOURS)
    colour[rows, which] = torch.where(kind == 1, other, colour[rows, which])
    shape = torch.where((kind == 2)[:, None], shape.flip(1), shape)
    turned = (kind == 3)[:, None]
    shape, colour = (torch.where(turned, values.flip(1), values) for values in (shape, colour))
    relation = torch.where(kind == 4, (relation - 1 + move(4)) % 4 + 1, relation)
    mirror = (kind == 5) & ((relation == LEFT) | (relation == RIGHT))
    relation = torch.where(mirror, LEFT + RIGHT - relation, relation)
    return replace(batch, shape=shape, colour=colour, relation=relation)


def slots_of(batch: Scenes) -> Tensor:
    """(B, 7): colour, shape, size of the first object and of the second, and the relation, never "right of"."""
    looks = torch.stack([batch.colour, batch.shape, batch.size], 2)
    looks[batch.count == 1, 1] = -100
    right = batch.relation == RIGHT
    looks = torch.where(right[:, None, None], looks.flip(1), looks)
    return torch.cat([looks.flatten(1), torch.where(right, LEFT, batch.relation)[:, None]], 1)


def slot_loss(logits: Tensor, slots: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, sum(SLOTS))."""
    pairs = zip(logits.split(SLOTS, 1), slots.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(logit, target, ignore_index=-100) for logit, target in pairs]).sum()


def same(a: Tensor, b: Tensor) -> Tensor:
    """(..., B, K): whether scenes (..., B, 1, 7) and (..., 1, K, 7) have one caption, sizes left out."""
    return (a == b)[..., [0, 1, 3, 4, 6]].all(-1)


def towers_loss(model: Towers, pool: Pairs) -> Loss:
    """Which caption is the picture's and which picture the caption's, and what either says of the scene."""

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        index = micro_batch.randint("index", len(pool.pictures))
        pictures = pool.pictures[index].float() / 127.5 - 1
        pictures[: micro_batch.count // 4] = recoloured(soft(pictures[: micro_batch.count // 4])).clamp(-1, 1)
        slots, others = pool.slots[index], pool.wrong_slots[index]
        right, wrong = pool.right[index, micro_batch.randint("style", 2)], pool.wrong[index]
        image_states, text_states = model.image(pictures), model.text(torch.cat([right, wrong.flatten(0, 1)])).pooled
        image, text = F.normalize(image_states, dim=1), F.normalize(text_states, dim=1)
        text, mistakes = text[: micro_batch.count], text[micro_batch.count :].unflatten(0, (micro_batch.count, WRONG))
        scale, own = model.sharpness.clamp(max=4.6).exp(), torch.arange(micro_batch.count)
        twins = same(slots[:, None], slots[None]) & (own[:, None] != own)
        among = (scale * image @ text.T).masked_fill(twins, NEVER)
        against = (scale * torch.einsum("bd,bkd->bk", image, mistakes)).masked_fill(same(slots[:, None], others), NEVER)
        rows = torch.cat([among, against], 1)
        contrast = (F.cross_entropy(rows, own) + F.cross_entropy(among.T, own)) / 2
        slots_loss = slot_loss(model.seen(image_states), slots) + slot_loss(
            model.said(text_states[: micro_batch.count]), slots
        )
        known = (rows.argmax(1) == own).float().mean()
        return {"loss": contrast + SLOT_WEIGHT * slots_loss, "contrast": contrast, "told": slots_loss, "right": known}

    return loss


def nearness(model: Towers, image: Tensor, batch: Scenes) -> Tensor:
    """(B,): the cosines of pictures and canonical captions."""
    text = model.text(ids_of(captions(batch, seed=0, style="canonical"))).pooled
    return (image * F.normalize(text, dim=1)).sum(1)


@torch.no_grad()
def scores(model: Towers, count: int) -> dict[str, float]:
    """Shares of fresh pictures, by split, that are nearer to their caption than to any of 3 with one thing wrong."""
    scores = {}
    for i, split in enumerate(("train", "heldout", "unseen_atoms")):
        for single in (1.0, 0.0):
            batch = scenes(count, seed=SEED + 10**9 + i, split=split, single=single)
            generator = torch.Generator().manual_seed(i)
            image = F.normalize(model.image(render(batch, SIDE)), dim=1)
            own, won = nearness(model, image, batch), torch.ones(count, dtype=torch.bool)
            for _ in range(WRONG):
                other = mistaken(batch, generator)
                won &= (own > nearness(model, image, other)) | same(slots_of(batch), slots_of(other))
            scores[f"{split}, {'one object' if single else 'two objects'}"] = float(won.float().mean())
    return scores


@torch.no_grad()
def even_out(tower: ImageTower, pictures: Tensor) -> None:
    """Give each feature a standard deviation of 1 over `pictures`, and the embeddings what they had.

    FID then is of the order of 1 a feature, and none of them drowns the others.
    """
    spread = torch.cat([tower.features(some) for some in pictures.split(100)]).std(0)
    tower.widen.weight /= spread[:, None]
    tower.widen.bias /= spread
    tower.projection.weight *= spread


TOKENIZER = block_tokenizer()


@dataclass(frozen=True, kw_only=True)
class ContrastiveTask:
    """The task: from `pictures` renders; `scored` fresh ones of each kind are matched at the end."""

    pictures: int = 12_288
    scored: int = 500

    def prepare(self, plan: Plan) -> StageSetup:
        """Draw the pictures."""
        torch.manual_seed(plan.seed)
        towers = Towers()
        loss = towers_loss(towers, drawn(self.pictures, plan.seed))

        def finish(trainer: Trainer) -> None:
            towers.load_state_dict(trainer.averaged("towers"))
            even_out(towers.image, render(scenes(SPREAD, seed=SEED + 2 * 10**9), SIDE))
            for name, tower in (("image", towers.image), ("text", towers.text)):
                save_network(tower, plan.folder / "weights" / name)
            for kind, share in scores(towers.eval(), self.scored).items():
                print(f"{kind:28s} {share:.4f}", flush=True)

        return StageSetup(objectives={"towers": Objective(network=towers, loss=loss)}, finish=finish)


def stages(out: Path) -> Sequence[RecipeStage]:
    """The one stage."""
    plan = Plan(
        folder=out / "block-clip",
        steps=1000,
        batch_size=96,
        learning_rate=2e-3,
        lr_decay_fraction=0.5,
        weight_decay=1e-3,
        ema_decay=0.998,
    )
    return [RecipeStage(task=ContrastiveTask(), plan=plan)]
