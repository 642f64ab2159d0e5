"""What this card can do: which models and which kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fewstep.engines.autotune import Autotuner
from fewstep.engines.cuda.operations import Operations, PlainOperations
from fewstep.locks import made_once
from fewstep.models.networks import Networks

LEAST_CAPABILITY = (7, 5)
"""Of the oldest cards that PyTorch's builds for CUDA 13 run on."""

_log = logging.getLogger(__name__)


def is_on_one_card(networks: Networks) -> bool:
    """Whether all weights are on one NVIDIA card that is new enough."""
    device = networks.device
    here = all(weight.device == device for network in networks for weight in network.parameters())
    return here and device.type == "cuda" and torch.version.hip is None and _capability(device) >= LEAST_CAPABILITY


def on_card(device: torch.device) -> AbstractContextManager[object]:
    """With `device` as the card that streams, graphs and kernels take."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class StreamOrder:
    """Makes calls from different streams of a card wait for each other: graphs have one set of inputs and outputs."""

    def __init__(self) -> None:
        self._last: torch.cuda.Stream | None = None

    def follow(self, device: torch.device) -> None:
        """Let the current stream wait for the one that was current at the call before."""
        if device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current


@made_once
def operations(device: torch.device, autotuner: Autotuner) -> Operations:
    """The kernels, with PyTorch's own operation in the place of each that cannot be compiled or computes wrongly."""
    plain = PlainOperations()
    if device.type != "cuda":
        return plain
    try:
        from fewstep.engines.cuda.kernels import TritonOperations

        found = TritonOperations(autotuner)
    except Exception as error:  # Triton is missing, or its driver, or a linker
        _log.warning("there are no kernels for %s (%s): PyTorch's operations take their place", device, error)
        return plain
    with on_card(device):  # Triton launches on the current one
        failed = dict(_failed(found, plain, device))
    for name in failed:
        vars(found)[name] = getattr(plain, name)
    if failed:
        _log.warning("kernels that cannot be used on %s, PyTorch's operations take their places: %s", device, failed)
    return found


def _failed(found: Operations, plain: Operations, device: torch.device) -> Iterator[tuple[str, str]]:
    """The operations of `found` that do not compute what those of `plain` do, and why."""
    with torch.no_grad():
        for name, call in _examples(device).items():
            try:
                pairs = zip(call(found), call(plain), strict=True)
                if all(torch.allclose(a.float(), b.float(), atol=2e-2) for a, b in pairs):
                    continue
                reason = "computes wrongly"
            except Exception as error:  # Triton's compiler fails in many ways
                reason = f"{type(error).__name__}: {error}"[:200]
            yield name, reason


def _examples(device: torch.device) -> dict[str, Callable[[Operations], Sequence[Tensor]]]:
    """A call of each operation, by its name."""
    rows = torch.linspace(-3000, 3000, 2 * 50 * 96, device=device).sin().view(2, 50, 96).half()
    tall, few = rows.view(1, 1200, 8), nn.GroupNorm(2, 8, device=device).half()  # more pixels than a small map has
    group, layer = nn.GroupNorm(8, 96, device=device).half(), nn.LayerNorm(96, device=device).half()
    return {
        "group_norm": lambda by: [by.group_norm(rows, group, rows[:, 0].contiguous())],
        "add_norm": lambda by: by.add_norm(rows, rows, layer),
        "row_norm": lambda by: [by.row_norm(rows, rows[0, 0], layer)],
        "gated": lambda by: [by.gated(rows)],
        "added": lambda by: [by.added(rows, rows[0, 0], rows)],
        "added_moments": lambda by: _added_and_normed(by, tall, few),
        "weave": lambda by: [by.weave(rows.view(2, 5, 10, 96).permute(0, 3, 1, 2), rows[0, 0, :24])],
    }


def _added_and_normed(by: Operations, x: Tensor, norm: nn.GroupNorm) -> Sequence[Tensor]:
    total, moments = by.added_moments(x, None, x)
    return total, by.group_norm(total, norm, moments=moments)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
