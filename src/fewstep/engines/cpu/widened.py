"""Small layers whose weights are kept in half precision and computed with in float32."""

from __future__ import annotations

from collections import UserDict

import torch.nn.functional as F
from torch import Tensor, nn


class Widened(UserDict[str, Tensor | None]):
    """The parameters of a layer in float32: those of `data`, each widened whenever it is asked for."""

    def __init__(self, data: dict[str, nn.Parameter | None]) -> None:
        self.data = data  # type: ignore[assignment]  # not a copy: parameters that are set later count

    def __getitem__(self, name: str) -> Tensor | None:
        found = self.data[name]
        return None if found is None else found.float()


class FastEmbedding(nn.Module):
    """The rows of an embedding that are asked for, widened after they have been taken."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.layer = (layer,)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.layer[0].weight).float()
