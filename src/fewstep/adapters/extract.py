"""The difference of two models as a LoRA: how a fine-tuned or distilled edition is shipped beside its base."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.adapters.lora import Factors, Lora, layers_of, networks
from fewstep.errors import InputError
from fewstep.weights.model import Loaded


class _Change(NamedTuple):
    """A layer's change as singular vectors and values, and the shape of its weight."""

    u: Tensor
    s: Tensor
    v: Tensor
    shape: torch.Size

    @property
    def cost(self) -> int:
        """Numbers that one more rank takes."""
        return len(self.u) + self.v.shape[1]


@torch.no_grad()
def extracted_lora(base: Loaded, tuned: Loaded, *, rank: int, name: str = "lora") -> tuple[Lora, float]:
    """The LoRA that brings `base` nearest to `tuned`, as large as one of `rank` in each layer, and how far they stay.

    Nearest in squared error, by singular values: a layer's own rank is what its values deserve for what they cost. The
    distance is relative to that without the LoRA; biases and norms, which a LoRA cannot change, are not counted.
    InputError for models of other shapes.
    """
    if rank < 1:
        raise InputError(f"the rank is {rank}; it must be 1 or more")
    ours, theirs = layers_of(networks(base)), layers_of(networks(tuned))
    if {n: layer.weight.shape for n, layer in ours.items()} != {n: layer.weight.shape for n, layer in theirs.items()}:
        raise InputError(
            f"{base.spec.name} and {tuned.spec.name} have other layers; a LoRA is the difference of two alike"
        )
    changes = dict[str, _Change]()
    for layer, module in ours.items():
        change = (theirs[layer].weight.float() - module.weight.float()).flatten(1)
        if change.any():
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            changes[layer] = _Change(u, s, v, module.weight.shape)
    ranks = dict(zip(changes, _ranks(list(changes.values()), rank), strict=True))
    layers = {layer: _factors(changes[layer], rank) for layer, rank in ranks.items() if rank}
    left = sum(float(changes[layer].s[rank:].square().sum()) for layer, rank in ranks.items())
    whole = sum(float(change.s.square().sum()) for change in changes.values())
    return Lora(name=name, layers=layers), sqrt(left / whole) if whole else 0.0


def _ranks(changes: Sequence[_Change], rank: int) -> list[int]:
    """How many singular values of each change are kept: those with the most square for what they cost."""
    worth = sorted(
        ((float(s) ** 2 / change.cost, i) for i, change in enumerate(changes) for s in change.s), reverse=True
    )
    budget, ranks = sum(min(rank, len(change.s)) * change.cost for change in changes), [0] * len(changes)
    for _, i in worth:
        if changes[i].cost <= budget:
            ranks[i], budget = ranks[i] + 1, budget - changes[i].cost
    return ranks


def _factors(change: _Change, rank: int) -> Factors:
    root, shape = change.s[:rank].sqrt(), change.shape
    down = (root[:, None] * change.v[:rank]).reshape(rank, *shape[1:])
    up = (change.u[:, :rank] * root).reshape(shape[0], rank, *[1] * (len(shape) - 2))
    return Factors(down=down.contiguous(), up=up.contiguous(), alpha=float(rank))
