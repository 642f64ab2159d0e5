"""Activation checkpointing for residual and transformer blocks."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep only the inputs of each residual block and transformer for the backward pass (arXiv:1604.06174).

    A block is what lies in a list of `resnets`, `attentions` or `layers`; names and results stay as they are.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("resnets", "attentions", "layers"):
            for block in module:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
