"""Small layers whose weights are kept in half precision and computed with in float32."""

from __future__ import annotations

from collections import UserDict

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.engines.replace_layers import SourceLayer


class Float32Parameters(UserDict[str, Tensor | None]):
    """A view of a layer's parameters in float32: those of `data`, each converted whenever it is read."""

    def __init__(self, data: dict[str, nn.Parameter | None]) -> None:
        self.data = data  # type: ignore[assignment]  # not a copy: parameters that are set later count

    def __getitem__(self, name: str) -> Tensor | None:
        found = self.data[name]
        return None if found is None else found.float()


class FastEmbedding(nn.Module):
    """An embedding whose rows are converted to float32 after the lookup."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.source = SourceLayer(layer)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.source.layer.weight).float()
