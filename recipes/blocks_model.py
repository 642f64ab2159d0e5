"""What blocks-base is made of, and the slots that its text tower is trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from blocks_data import SIZE, WINDOW
from torch import Tensor, nn

from fewstep.blockworld import COLOURS, RELATIONS, SHAPES, SIZES, vocabulary
from fewstep.models.config import AutoencoderConfig, Stage, TextConfig, UNetConfig
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Defaults

AUTOENCODER = AutoencoderConfig(channels=(16, 32, 64, 64), resnets=1, groups=8, scaling_factor=1.0)
TEXT = TextConfig(
    vocabulary=len(vocabulary()) + 4, window=WINDOW, width=128, layers=2, heads=4, inner=512, activation="gelu", eos=2
)
DEFAULTS = Defaults(steps=10, guidance_scale=3.5, sampler="ddim", schedule="trailing", width=SIZE, height=SIZE)
SLOTS = (len(COLOURS), len(SHAPES), len(SIZES)) * 2 + (len(RELATIONS),)


def unet_config(resnets: int) -> UNetConfig:
    """The UNet with 1 or 2 residual blocks a level: it starts small and is grown."""
    stages = (
        Stage(channels=64, resnets=resnets, depth=1, heads=4),
        Stage(channels=128, resnets=resnets, depth=1, heads=4),
    )
    return UNetConfig(stages=stages, context=TEXT.width, groups=16)


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
    to_device = {re.sub(r"(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", name): value for name, value in small.items()}
    fresh = large.state_dict()
    assert to_device.keys() <= fresh.keys(), "every layer of the small model has a place in the large one"
    large.load_state_dict(fresh | to_device)
    for block in (*large.unet.down_blocks, *large.unet.up_blocks):
        nn.init.zeros_(block.attentions[1].proj_out.weight)
        nn.init.zeros_(block.attentions[1].proj_out.bias)
        nn.init.zeros_(block.resnets[1].conv2.weight)
        nn.init.zeros_(block.resnets[1].conv2.bias)
    for block in large.unet.up_blocks:  # where the shortcut drops the skip connection
        nn.init.zeros_(block.resnets[1].conv_shortcut.bias)
        nn.init.dirac_(block.resnets[1].conv_shortcut.weight)
