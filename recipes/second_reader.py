"""second-reader: the network that reads block pictures beside the algorithm; see `fewstep.blockworld.learned_detector`.

    fewstep train recipes/second_reader.py

2000 steps of 64, about 4 minutes of one CPU core (Zen 5), 2 GB. The weights, for src/fewstep/assets/block-readers, are
written below the run's folder, and its scores printed.

It sees renders of all splits, which generators do not, with seeds of its own; blurred, noisy, wavy and recoloured a
little, so that it reads what a decoder draws; and pictures that no caption has, with an object too many, one drawn
twice, or none. No generated picture is ever among them. Score: see the card beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.blockworld import Scenes, captions, render, scenes
from fewstep.blockworld.backbone import SIDE
from fewstep.blockworld.grading import grade
from fewstep.blockworld.layout import COS
from fewstep.blockworld.learned_detector import GRID, FindingNetwork, SecondReader, parts_of
from fewstep.blockworld.scene import HALF_WIDTHS, HEIGHTS, LEFT, RADII, RIGHT
from fewstep.train.plan import MicroBatch, Plan
from fewstep.train.stages import RecipeStage, StageSetup
from fewstep.train.trainer import Loss, Objective, Trainer
from fewstep.weights.auxiliary import save_network

SEED = 7_000_000_000  # no other recipe draws scenes from here on
SPLITS = {"train": 0.5, "heldout": 0.25, "unseen_atoms": 0.25}
CROWDED, EMPTY = 0.35, 0.03  # shares of pictures with an object too many (of which a third is kept), and with none
TWICE = 0.5  # share of the objects too many that repeat the first one
OBJECTS = 3
AROUND, SHARPEN = 0.1, 1400  # weight of the cells around a middle, and from which step on


@dataclass(frozen=True, kw_only=True)
class LabelledPictures:
    """Pictures (N, 3, 64, 64) uint8 and the objects in them, at most 3, -100 for none or not known.

    `objects` (N, 3, 6): row and column on the grid, colour, shape, size, part.
    """

    pixels: Tensor
    objects: Tensor

    @classmethod
    def joined(cls, parts: list[LabelledPictures]) -> LabelledPictures:
        """All of them."""
        return cls(pixels=torch.cat([p.pixels for p in parts]), objects=torch.cat([p.objects for p in parts]))


def drawn(count: int, seed: int) -> LabelledPictures:
    """Fresh pictures: of all splits, and a share of them crowded or empty."""
    parts = []
    for i, (split, share) in enumerate(SPLITS.items()):
        plain = scenes(round(count * share * (1 - CROWDED - EMPTY)), seed=SEED + seed * 8 + i, split=split, single=0.35)
        parts.append(LabelledPictures(pixels=bytes_of(render(plain, SIDE)), objects=objects_of(plain)))
    parts.append(crowded(round(count * CROWDED), SEED + seed * 8 + 5))
    bare = scenes(round(count * EMPTY), seed=SEED + seed * 8 + 6)
    bare = replace(bare, count=torch.zeros_like(bare.count))
    parts.append(LabelledPictures(pixels=bytes_of(render(bare, SIDE)), objects=objects_of(bare)))
    return LabelledPictures.joined(parts)


def crowded(count: int, seed: int) -> LabelledPictures:
    """Scenes with one more object somewhere, which hides little of the others."""
    torch.manual_seed(seed)
    base = scenes(count, seed=seed, single=0.5)
    extra = scenes(count, seed=seed + 1, single=1.0)
    twice = torch.rand(count) < TWICE
    looks = {
        name: torch.where(twice[:, None], getattr(base, name), getattr(extra, name))
        for name in ("shape", "colour", "size")
    }
    spot = torch.stack([torch.rand(count) * 1.3 - 0.65, torch.rand(count) * 0.9 - 0.75, torch.zeros(count)], 1)
    position = extra.position.clone()
    position[:, 0] = spot
    extra = replace(extra, **looks, position=position, backdrop=base.backdrop, tone=base.tone)
    bare = (render(replace(base, count=torch.zeros_like(base.count)), SIDE) + 1) / 2
    first, second = ((render(one, SIDE) + 1) / 2 for one in (base, extra))
    here, there = (body(picture, bare) for picture in (first, second))
    clash = (here & there).sum((1, 2)) / torch.minimum(here.sum((1, 2)), there.sum((1, 2))).clamp(min=1)
    both = torch.where(there[:, None], second, first * (second / bare.clamp(min=1e-3)).clamp(max=1))
    valid = clash < 0.08
    objects = torch.cat([objects_of(base)[:, :2], objects_of(extra)[:, :1]], 1)
    objects[:, :, 5] = -100
    alone = (base.count == 1) & far_apart(base, extra)
    objects[alone, :, 5] = 0
    return LabelledPictures(pixels=bytes_of(both * 2 - 1)[valid], objects=objects[valid])


def body(picture: Tensor, bare: Tensor) -> Tensor:
    """(B, S, S): where an object is; shadows on the nearly grey stage are neither coloured nor bright."""
    coloured = picture.amax(1) - picture.amin(1) > 0.16
    return coloured | ((picture - bare).amax(1) > 0.02)


def far_apart(one: Scenes, other: Scenes) -> Tensor:
    """(B,): whether the first objects stand in no relation: aside, and one much further back."""
    gap = (one.position[:, 0] - other.position[:, 0]).abs()
    reach = sum(HALF_WIDTHS[s.shape[:, 0]] * RADII[s.size[:, 0]] for s in (one, other))
    return (gap[:, 0] > 1.1 * reach) & (gap[:, 1] > 0.3)


def objects_of(batch: Scenes) -> Tensor:
    """(B, 3, 6) as in `LabelledPictures`, the first object of the relation as read first."""
    objects = torch.full((len(batch), OBJECTS, 6), -100)
    rise = batch.position[..., 2] + HEIGHTS[batch.shape] * RADII[batch.size] / 2
    column = (batch.position[..., 0] + 1) / 2 * GRID
    row = (1 - batch.position[..., 1] - rise * COS) / 2 * GRID
    rows = torch.stack([row, column], -1).floor().long().clamp(1, GRID - 2)
    relation = torch.where(batch.relation == RIGHT, LEFT, batch.relation)
    played = torch.tensor([parts_of(r) for r in relation.tolist()]).view(-1, 2)
    played = torch.where((batch.relation == RIGHT)[:, None], played.flip(1), played)
    values = torch.cat([rows, torch.stack([batch.colour, batch.shape, batch.size, played], -1)], -1)
    there = torch.arange(2) < batch.count[:, None]
    objects[:, :2] = torch.where(there[..., None], values, -100)
    return objects


def bytes_of(pictures: Tensor) -> Tensor:
    """uint8 of pictures in [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


def worn(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] as a decoder, a camera or a file might give them; each of the faults to some."""
    for fault, share in ((wavy, 0.4), (soft, 0.5), (blotched, 0.4), (recoloured, 0.5), (grained, 0.5), (blocky, 0.2)):
        chosen = torch.rand(len(pictures)) < share
        if chosen.any():
            pictures = pictures.clone()
            pictures[chosen] = fault(pictures[chosen])
    return pictures.clamp(-1, 1)


def wavy(pictures: Tensor) -> Tensor:
    """Edges bent by up to about a pixel, smoothly."""
    count, side = len(pictures), pictures.shape[-1]
    bend = F.interpolate(torch.randn(count, 2, 12, 12) * torch.rand(count, 1, 1, 1), (side, side), mode="bilinear")
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 1, side, side], align_corners=False)
    return F.grid_sample(pictures, grid + bend.movedim(1, 3) * 1.4 / side, padding_mode="border", align_corners=False)


def soft(pictures: Tensor) -> Tensor:
    """Smaller, and enlarged again."""
    side = pictures.shape[-1]
    small = F.interpolate(pictures, size=int(torch.randint(side // 2, side, ())), mode="bilinear", antialias=True)
    return F.interpolate(small, (side, side), mode="bicubic")


def blotched(pictures: Tensor) -> Tensor:
    """Uneven in colour, in patches of 4 and 8 pixels, as a small autoencoder leaves it."""
    side = pictures.shape[-1]
    patches = [
        F.interpolate(torch.randn(len(pictures), 3, n, n), (side, side), mode="bicubic") for n in (side // 4, side // 8)
    ]
    return pictures + 0.08 * torch.rand(len(pictures), 1, 1, 1) * sum(patches)


def recoloured(pictures: Tensor) -> Tensor:
    """Of a little more or less contrast, light, and saturation."""
    contrast, light, colour = (torch.rand(3, len(pictures), 1, 1, 1) - 0.5) * torch.tensor([0.4, 0.3, 0.5])[
        :, None, None, None, None
    ]
    tint = 0.05 * torch.randn(len(pictures), 3, 1, 1)
    grey = pictures.mean(1, keepdim=True)
    return (grey + (pictures - grey) * (1 + colour)) * (1 + contrast) + light + tint


def grained(pictures: Tensor) -> Tensor:
    """With noise of a standard deviation up to 0.12."""
    return pictures + 0.12 * torch.rand(len(pictures), 1, 1, 1) * torch.randn_like(pictures)


def blocky(pictures: Tensor) -> Tensor:
    """Cosine coefficients of 8 x 8 blocks rounded, the high ones more, as JPEG does."""
    n = torch.arange(8)
    basis = torch.cos(torch.pi / 8 * (n[None] + 0.5) * n[:, None]) / 2
    basis[0] /= 2**0.5
    step = (1 + n[:, None] + n[None]) * (0.02 + 0.06 * torch.rand(len(pictures), 1, 1, 1, 1, 1))
    blocks = pictures.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, 3, rows, columns, 8, 8)
    rounded = ((basis @ blocks @ basis.T) / step).round() * step
    return (basis.T @ rounded @ basis).transpose(3, 4).flatten(4).flatten(2, 3)


def finding_loss(model: FindingNetwork, pool: LabelledPictures) -> Loss:
    """Whether there is a middle in each cell, and of those there are, colour, shape, size and part.

    The eight cells around a middle may say either at first; in the last third they count a little, so that the middle
    stands out. Each is asked for the rest as often as the middle itself.
    """

    def loss(micro_batch: MicroBatch) -> dict[str, Tensor]:
        index = micro_batch.randint("index", len(pool.pixels))
        present, *logits = model(worn(pool.pixels[index].float() / 127.5 - 1))
        owner, there = known(pool.objects[index])
        targets = cells(len(index), owner, there, AROUND if micro_batch.step >= SHARPEN else 0.0)
        presence = F.binary_cross_entropy_with_logits(present[:, 0], *targets, reduction="sum")
        row, column = (there[:, i] + torch.randint(-1, 2, (len(there),)) for i in (0, 1))
        outputs = [values[owner, :, row, column] for values in logits]
        wrong = [F.cross_entropy(outputs[i], there[:, 2 + i], ignore_index=-100) for i in range(len(outputs))]
        right = [(outputs[i].argmax(1) == there[:, 2 + i]).float().mean() for i in range(3)]
        names = ("colour", "shape", "size")
        total = presence / len(there) + torch.stack(wrong).sum()
        return {"loss": total, "found": presence / len(there), **dict(zip(names, right, strict=True))}

    return loss


def known(objects: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) which picture each object is in, and (M, 6) the objects, of (B, 3, 6)."""
    owner, which = (objects[:, :, 0] >= 0).nonzero(as_tuple=True)
    return owner, objects[owner, which]


def cells(count: int, owner: Tensor, there: Tensor, around: float) -> tuple[Tensor, Tensor]:
    """(B, 16, 16) twice: 1 where a middle is, and how much each cell counts, those `around` a middle less."""
    present, weight = torch.zeros(count, GRID, GRID), torch.ones(count, GRID, GRID)
    for down, right in [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]:
        weight[owner, there[:, 0] + down, there[:, 1] + right] = around
    present[owner, there[:, 0], there[:, 1]] = weight[owner, there[:, 0], there[:, 1]] = 1
    return present, weight


def score(reader: SecondReader, count: int, spoil: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Shares of fresh renders that are read exactly, by split and number of objects; sizes where they are said."""
    presence = {}
    for i, split in enumerate(SPLITS):
        for single in (1.0, 0.0):
            batch = scenes(count, seed=SEED + 10**9 + i, split=split, single=single)
            prompts = captions(batch, seed=0, style="canonical")
            grades = grade(reader.read(spoil(render(batch, SIDE))), batch, prompts)
            presence[f"{split}, {'one object' if single else 'two objects'}"] = grades.exact
    return presence


@dataclass(frozen=True, kw_only=True)
class DetectorTask:
    """The task: from `pictures` renders; `scored` fresh ones of each kind are read at the end."""

    pictures: int = 8192
    scored: int = 500

    def prepare(self, plan: Plan) -> StageSetup:
        """Draw the pictures."""
        torch.manual_seed(plan.seed)
        network = FindingNetwork()
        loss = finding_loss(network, drawn(self.pictures, plan.seed))

        def finish(trainer: Trainer) -> None:
            network.load_state_dict(trainer.averaged("network"))
            save_network(network, plan.folder / "weights")
            torch.manual_seed(plan.seed)
            for name, spoil in (("clean", torch.clone), ("worn", worn)):
                for kind, share in score(SecondReader(network), self.scored, spoil).items():
                    print(f"{name:6s} {kind:28s} {share:.4f}", flush=True)

        return StageSetup(objectives={"network": Objective(network=network, loss=loss)}, finish=finish)


def stages(out: Path) -> Sequence[RecipeStage]:
    """The one stage."""
    plan = Plan(
        folder=out / "second-reader",
        steps=2000,
        batch_size=64,
        learning_rate=2e-3,
        lr_decay_fraction=0.5,
        weight_decay=1e-3,
        ema_decay=0.998,
    )
    return [RecipeStage(task=DetectorTask(), plan=plan)]
