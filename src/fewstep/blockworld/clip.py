"""Two small towers for block pictures and their captions, made as CLIP is: they give CLIP scores and FID features.

They were trained together on the training split alone (`recipes/block_clip.py`) and judge nothing but block pictures;
neither shares a weight with a reader.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.blockworld.backbone import CHANNELS, Backbone
from fewstep.blockworld.captions import vocabulary
from fewstep.models.config import TextConfig
from fewstep.text.tokenizer import Tokenizer, word_tokenizer

EMBEDDING, FEATURES, SQUEEZED = 64, 128, 24
WINDOW = 24
TEXT = TextConfig(
    vocabulary=len(vocabulary()) + 4,
    window=WINDOW,
    width=64,
    layers=2,
    heads=4,
    inner=256,
    activation="gelu",
    projection=EMBEDDING,
    eos=2,
)


class ImageTower(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> embeddings (B, 64), not normed."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Backbone()
        self.squeeze = nn.Conv2d(CHANNELS[-1], SQUEEZED, 1)
        self.widen = nn.Linear(SQUEEZED * 16, FEATURES)
        self.projection = nn.Linear(FEATURES, EMBEDDING, bias=False)

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 128): what FID compares."""
        coarse = self.trunk(pictures)[-1]
        found: Tensor = self.widen(F.relu(self.squeeze(F.relu(coarse))).flatten(1))
        return found

    def forward(self, pictures: Tensor) -> Tensor:
        embedded: Tensor = self.projection(F.relu(self.features(pictures)))
        return embedded


def block_tokenizer() -> Tokenizer:
    """All words of blockworld, in a window of 24."""
    return word_tokenizer(vocabulary(), WINDOW)
