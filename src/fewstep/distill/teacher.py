"""The frozen network that students learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.engines.engine import Conditioning, stacked
from fewstep.models.unet import UNet
from fewstep.train.forward_process import ForwardProcess, conditioning_rows, predicted


class Teacher:
    """A frozen UNet that predicts clean latents, with guidance; `empty`: an empty prompt's conditioning, one row."""

    def __init__(self, unet: UNet, process: ForwardProcess, empty: Conditioning | None = None) -> None:
        self.unet, self.process, self.empty = unet.eval().requires_grad_(False), process, empty

    @torch.no_grad()
    def x0(self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance: float) -> Tensor:
        """The predicted x0 (B, 4, h, w) for x (B, 4, h, w) at steps t (B,); guidance 1 is none."""
        if guidance == 1 or self.empty is None:
            return self.process.x0(predicted(self.unet, x, t, conditioning), x, t)
        both = stacked(
            conditioning, conditioning_rows(self.empty, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        )
        conditional, unconditional = predicted(self.unet, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return self.process.x0(unconditional + guidance * (conditional - unconditional), x, t)
