"""How a network is trained: how long, how fast, and how its batches are shared out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewstep.errors import InputError, quoted, unknown
from fewstep.train.checks import AT_LEAST_1, COUNT, SHARE, WEIGHT, Range, check_number, check_ranges

Precision = Literal["fp32", "bf16", "fp16"]
Sharing = Literal["replicate", "shard"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
SHARINGS: tuple[Sharing, ...] = ("replicate", "shard")
CPU = torch.device("cpu")
DECAY = Range(low=0, high=1, below=True, usual=0.999)
RANGES = {
    "steps": AT_LEAST_1,
    "seconds": Range(low=0, above=True, usual=60),
    "batch": AT_LEAST_1,
    "accumulate": AT_LEAST_1,
    "seed": Range(low=0, high=2**63 - 1, whole=True),
    "rate": Range(low=0, above=True, usual=1e-4),
    "warmup": COUNT,
    "decay": SHARE,
    "floor": SHARE,
    "weight_decay": WEIGHT,
    "clip": Range(low=0, above=True, endless=True, usual=1),
    "ema": DECAY,
    "save_seconds": Range(low=0, endless=True),
    "log_steps": AT_LEAST_1,
    "sample_steps": COUNT,
    "keep": AT_LEAST_1,
}


class Inputs(Protocol):
    """Stands between a part and what it draws, so that a step can be replayed."""

    def read(self, micro_batch: MicroBatch, make: Callable[[MicroBatch], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """See `MicroBatch.inputs`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run is and how it is optimised; raises `InputError` for what cannot be.

    It ends after `steps`, or `seconds` of training, whichever comes first; a run that is limited by time cannot be
    repeated bit for bit. `batch` pictures make a step, over all ranks and `accumulate` parts. The learning rate rises
    over `warmup` steps to `rate`, stays, and falls as half a cosine to `floor` times `rate` over the last share `decay`
    of the run. `ema`: the decay of the moving average. Networks keep float32 weights; `precision` is what their
    forward passes compute in. `sharing`: every rank has all weights, or a part of them (FSDP2). `checkpointing`
    computes the blocks' insides twice to save memory. `replayed`: on a card, steps that allow it are recorded as CUDA
    graphs, which spares small networks most of the host's time. Checkpoints are written
    every `save_seconds`, the `keep` last stay. `tensorboard`: write the log's numbers for TensorBoard too.
    """

    folder: Path
    steps: int | None = None
    seconds: float | None = None
    batch: int = 32
    accumulate: int = 1
    seed: int = 0
    rate: float = 1e-4
    warmup: int = 100
    decay: float = 0.2
    floor: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.999
    precision: Precision = "fp32"
    sharing: Sharing = "replicate"
    compiled: bool = False
    checkpointing: bool = False
    replayed: bool = True
    save_seconds: float = 120.0
    log_steps: int = 50
    sample_steps: int = 0
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.folder, Path):
            raise InputError(f"plan.folder is {quoted(self.folder)}; give a pathlib.Path")
        if self.steps is None and self.seconds is None:
            raise InputError("the run has no end; give steps or seconds")
        if self.precision not in PRECISIONS:
            raise InputError(unknown("precision", self.precision, PRECISIONS))
        if self.sharing not in SHARINGS:
            raise InputError(unknown("sharing", self.sharing, SHARINGS))
        check_ranges(self, RANGES, path="plan.")
        if len(self.betas) != 2:
            raise InputError(f"plan.betas is {self.betas}; AdamW has two, such as 0.9,0.99")
        for beta in self.betas:
            check_number("plan.betas", beta, DECAY)

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the run is done, from 0 to 1."""
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_seconds = elapsed / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(by_steps, by_seconds))

    def rate_at(self, step: int, progress: float) -> float:
        """The learning rate of the step after `step`."""
        falling = max(0.0, progress - (1 - self.decay)) / self.decay if self.decay else 0.0
        share = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
        return self.rate * share * min(1.0, (step + 1) / max(1, self.warmup))

    def micro_batches(self, step: int, rank: int, ranks: int) -> list[MicroBatch]:
        """What `rank` of `ranks` computes in step `step`, one part after another."""
        count, rest = divmod(self.batch, ranks * self.accumulate)
        if rest:
            raise InputError(
                f"a batch of {self.batch} cannot be shared out over {ranks} ranks x {self.accumulate} parts; "
                f"the nearest that can are {self.batch - rest} and {self.batch - rest + ranks * self.accumulate}"
            )
        first = rank * self.accumulate * count
        return [
            MicroBatch(seed=self.seed, step=step, whole=self.batch, first=first + i * count, count=count)
            for i in range(self.accumulate)
        ]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows `first` to `first + count` of the `whole` batch of a step: what one process computes at a time.

    Random numbers are drawn for the whole batch, on the CPU, from the seed, the step and their purpose, and then cut.
    So a batch has the same ones however it is shared out and whatever computes it, and a run that goes on has them
    again.
    """

    seed: int
    step: int
    whole: int
    first: int
    count: int
    device: torch.device = CPU
    tape: Inputs | None = field(default=None, compare=False, repr=False)

    def on(self, device: torch.device) -> MicroBatch:
        """The same part, whose random numbers and inputs come on `device`; they are drawn on the CPU all the same."""
        return self if self.device == device else replace(self, device=device)

    def inputs(self, make: Callable[[MicroBatch], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What `make` reads and draws on the CPU for a part, on this part's device.

        `make` must be a function of the part alone. A step that is replayed (`fewstep.train.replay`) calls it anew for
        each step, and nothing else of the loss.
        """
        if self.tape is not None:
            return self.tape.read(self, make)
        return {name: to_device(value, self.device) for name, value in make(self.on(CPU)).items()}

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that is the same in all parts of a step."""
        return torch.Generator().manual_seed(mixed_seed(self.seed, self.step, purpose))

    def rows(self, purpose: str, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """The part's rows of what `draw(whole, generator)` gives for the batch."""

        def make(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            return {
                purpose: draw(micro_batch.whole, micro_batch.generator(purpose))[
                    micro_batch.first : micro_batch.first + micro_batch.count
                ]
            }

        return self.inputs(make)[purpose]

    def randn(self, purpose: str, *shape: int) -> Tensor:
        """(count, *shape) normal numbers."""
        return self.rows(purpose, lambda count, generator: torch.randn(count, *shape, generator=generator))

    def rand(self, purpose: str, *shape: int) -> Tensor:
        """(count, *shape) numbers in [0, 1)."""
        return self.rows(purpose, lambda count, generator: torch.rand(count, *shape, generator=generator))

    def randint(self, purpose: str, limit: int) -> Tensor:
        """(count,) integers in [0, limit)."""
        return self.rows(purpose, lambda count, generator: torch.randint(limit, (count,), generator=generator))


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`; from the CPU to a card without waiting for what the card still computes."""
    if device.type != "cuda" or value.device.type != "cpu":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def mixed_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that has nothing in common with that of any other `parts`."""
    digest = blake2b("/".join(str(micro_batch) for micro_batch in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
