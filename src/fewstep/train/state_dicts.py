"""Full state dicts of networks and optimizers on the CPU, whether their weights are replicated or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fewstep.errors import NotFiniteError

State = dict[str, Any]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def network_state(network: nn.Module) -> State:
    """Copies of all parameters and buffers by name; a call of all ranks together."""
    state: State = get_model_state_dict(network, options=WHOLE)
    return {name: value.clone() for name, value in state.items()}


def check_finite(name: str, state: State) -> None:
    """Raise `NotFiniteError` where a network's weights, which `name` names, are NaN or infinite."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise NotFiniteError(
                f"{name}: {key} holds NaN or infinity, so it is not saved; lower "
                "plan.learning_rate, and train on from the checkpoint before"
            )


def load_network(network: nn.Module, state: State) -> None:
    """Fill `network` with what `network_state` gave; every rank has the whole."""
    set_model_state_dict(network, state, options=WHOLE)


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's state by the parameters' names; a call of all ranks together."""
    return get_optimizer_state_dict(network, optimizer, options=WHOLE)


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give `optimizer` what `optimizer_state` gave."""
    set_optimizer_state_dict(network, optimizer, state, options=WHOLE)
