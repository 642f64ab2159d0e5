"""The settings of a training run's length and optimiser, and the micro-batches of its steps."""

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
from fewstep.train.renamed import refuses_renamed

Precision = Literal["fp32", "bf16", "fp16"]
Parallelism = Literal["replicate", "shard"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
PARALLELISMS: tuple[Parallelism, ...] = ("replicate", "shard")
CPU = torch.device("cpu")
DECAY = Range(low=0, high=1, below=True, usual=0.999)
RANGES = {
    "steps": AT_LEAST_1,
    "seconds": Range(low=0, above=True, usual=60),
    "batch_size": AT_LEAST_1,
    "gradient_accumulation": AT_LEAST_1,
    "seed": Range(low=0, high=2**63 - 1, whole=True),
    "learning_rate": Range(low=0, above=True, usual=1e-4),
    "warmup_steps": COUNT,
    "lr_decay_fraction": SHARE,
    "min_lr_ratio": SHARE,
    "weight_decay": WEIGHT,
    "max_grad_norm": Range(low=0, above=True, endless=True, usual=1),
    "ema_decay": DECAY,
    "save_seconds": Range(low=0, endless=True),
    "log_steps": AT_LEAST_1,
    "sample_steps": COUNT,
    "keep_checkpoints": AT_LEAST_1,
}


class Inputs(Protocol):
    """Supplies what a micro-batch reads and draws, so that a captured step can be replayed with new values."""

    def read(self, micro_batch: MicroBatch, make: Callable[[MicroBatch], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """See `MicroBatch.inputs`."""


@refuses_renamed
@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run is and how it is optimised; raises `InputError` for values out of range.

    It ends after `steps`, or `seconds` of training, whichever comes first; a run that is limited by time cannot be
    repeated bit for bit. `batch_size` pictures make a step, over all ranks and `gradient_accumulation` micro-batches.
    The learning rate rises over `warmup_steps` to `learning_rate`, stays, and falls as half a cosine to `min_lr_ratio`
    times `learning_rate` over the last `lr_decay_fraction` of the run. `ema_decay`: of the moving average of the
    weights. Networks keep float32 weights; `precision` is what their forward passes compute in. `parallelism`: every
    rank has all weights ("replicate"), or a part of them ("shard", FSDP2). `compile`: with `torch.compile`.
    `activation_checkpointing` computes the blocks' insides twice to save memory. `cuda_graphs`: on a card, steps that
    allow it are captured as CUDA graphs, which spares small networks most of the host's time. Checkpoints are written
    every `save_seconds`; the last `keep_checkpoints` stay. `tensorboard`: write the log's numbers for TensorBoard too.
    """

    folder: Path
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    seed: int = 0
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    lr_decay_fraction: float = 0.2
    min_lr_ratio: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "fp32"
    parallelism: Parallelism = "replicate"
    compile: bool = False
    activation_checkpointing: bool = False
    cuda_graphs: bool = True
    save_seconds: float = 120.0
    log_steps: int = 50
    sample_steps: int = 0
    keep_checkpoints: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.folder, Path):
            raise InputError(f"plan.folder is {quoted(self.folder)}; give a pathlib.Path")
        if self.steps is None and self.seconds is None:
            raise InputError("the run has no end; give steps or seconds")
        if self.precision not in PRECISIONS:
            raise InputError(unknown("precision", self.precision, PRECISIONS))
        if self.parallelism not in PARALLELISMS:
            raise InputError(unknown("parallelism", self.parallelism, PARALLELISMS))
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

    def learning_rate_at(self, step: int, progress: float) -> float:
        """The learning rate of the step after `step`."""
        falling = (
            max(0.0, progress - (1 - self.lr_decay_fraction)) / self.lr_decay_fraction
            if self.lr_decay_fraction
            else 0.0
        )
        share = self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
        return self.learning_rate * share * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def micro_batches(self, step: int, rank: int, ranks: int) -> list[MicroBatch]:
        """The micro-batches that `rank` of `ranks` computes in step `step`, in order."""
        rows = ranks * self.gradient_accumulation
        count, rest = divmod(self.batch_size, rows)
        if rest:
            raise InputError(
                f"a batch of {self.batch_size} cannot be shared out over {ranks} ranks x {self.gradient_accumulation} "
                f"micro-batches; the nearest that can are {self.batch_size - rest} and {self.batch_size - rest + rows}"
            )
        first = rank * self.gradient_accumulation * count
        return [
            MicroBatch(seed=self.seed, step=step, whole=self.batch_size, first=first + i * count, count=count)
            for i in range(self.gradient_accumulation)
        ]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows `first` to `first + count` of the `whole` batch of a step: what one process computes at a time.

    Random numbers are drawn for the whole batch, on the CPU, from the seed, the step and their purpose, and then cut.
    So a batch has the same ones whatever the number of ranks, the accumulation and the device, and a resumed run
    draws them again.
    """

    seed: int
    step: int
    whole: int
    first: int
    count: int
    device: torch.device = CPU
    tape: Inputs | None = field(default=None, compare=False, repr=False)

    def on(self, device: torch.device) -> MicroBatch:
        """The same micro-batch, its random numbers and inputs moved to `device` after they are drawn on the CPU."""
        return self if self.device == device else replace(self, device=device)

    def inputs(self, make: Callable[[MicroBatch], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What `make` reads and draws on the CPU for a micro-batch, on this one's device.

        `make` must be a function of the micro-batch alone. A step that is replayed
        (`fewstep.train.replay`) calls it anew for each step, and nothing else of the loss.
        """
        if self.tape is not None:
            return self.tape.read(self, make)
        return {name: to_device(value, self.device) for name, value in make(self.on(CPU)).items()}

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that is the same in all micro-batches of a step."""
        return torch.Generator().manual_seed(mixed_seed(self.seed, self.step, purpose))

    def rows(self, purpose: str, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """The micro-batch's rows of `draw(whole, generator)`, which draws for the whole batch."""

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
    digest = blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
