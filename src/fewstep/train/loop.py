"""The training loop: one for all networks, resumable after any kill."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fewstep.errors import InputError, NotFiniteError
from fewstep.train.checkpoint import load_checkpoint, save_checkpoint
from fewstep.train.ema import Ema
from fewstep.train.parallel import average, join_ranks

M = TypeVar("M", bound=nn.Module)
Loss = Callable[[int], Mapping[str, Tensor]]
"""step -> named scalars; the one called "loss" is made small, the others are only written down."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run is and how it is optimised.

    It ends after `steps`, or `seconds` of training, whichever comes first. The learning rate rises over `warmup` steps
    to `rate`, stays, and falls as half a cosine to `floor` times `rate` over the last share `decay` of the run.
    Times between checkpoints and between log lines are in seconds and steps.
    """

    folder: Path
    rate: float
    steps: int | None = None
    seconds: float | None = None
    warmup: int = 100
    decay: float = 0.2
    floor: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.999
    save_seconds: float = 120.0
    log_steps: int = 50
    keep: int = 2

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise InputError("the run has no end; give steps or seconds")

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


class Trainer(Generic[M]):
    """A model in training, its moving average, optimizer and clock; `run` trains, and goes on where it stopped.

    Under `torchrun` every rank has one and gives its own part of the batch; rank 0 writes. Parameters without
    `requires_grad` stay as they are.
    """

    def __init__(self, model: M, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.ema = Ema(model, plan.ema)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.rate, betas=plan.betas, weight_decay=plan.weight_decay, foreach=True
        )
        self.step, self.skipped = 0, 0
        self.clock = self.elapsed = 0.0
        self.rank, self.ranks = join_ranks()
        self.stopping = False
        self._restore()

    def run(self, loss: Loss, on_save: Callable[[Trainer[M]], None] | None = None) -> M:
        """Train to the end of the plan and return the averaged model.

        SIGTERM ends the run early with a checkpoint, from which the same call goes on. Raises `NotFiniteError` when 20
        steps in a row have no finite gradient; single ones are left out.
        """
        saved, before = time.monotonic(), signal.signal(signal.SIGTERM, self._stop)
        try:
            while not self.stopping and self.progress < 1:
                self._advance(loss)
                if time.monotonic() - saved > self.plan.save_seconds:
                    self.save()
                    if on_save is not None and self.rank == 0:
                        on_save(self)
                    saved = time.monotonic()
        finally:
            signal.signal(signal.SIGTERM, before)
        self.save()
        return self.ema.model

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1; the same on all ranks."""
        return self.plan.progress(self.step, self.elapsed)

    def save(self) -> None:
        """Write a checkpoint."""
        if self.rank == 0:
            save_checkpoint(self.plan.folder, self.step, self._state(), keep=self.plan.keep)

    def _advance(self, loss: Loss) -> None:
        """One step of the optimizer."""
        started = time.monotonic()
        rate = self.plan.rate_at(self.step, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        terms = loss(self.step)
        torch.autograd.backward(terms["loss"])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.elapsed, stop = average(gradients, (self.clock, float(self.stopping)))  # what all ranks agree on
        self.stopping = stop > 0
        norm = nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        self._apply(finite=bool(norm.isfinite()))
        if self.step % self.plan.log_steps == 0 and self.rank == 0:
            self._log({**{name: value.item() for name, value in terms.items()}, "norm": norm.item(), "rate": rate})
        self.clock = self.elapsed + time.monotonic() - started

    def _apply(self, *, finite: bool) -> None:
        self.step += 1
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= 20:
            raise NotFiniteError(f"training: no finite gradient in the 20 steps up to {self.step}; lower the rate")
        if finite:
            self.optimizer.step()
            self.ema.update(self.model)

    def _log(self, numbers: Mapping[str, float]) -> None:
        line = {"step": self.step, "seconds": round(self.elapsed, 1), **numbers}
        with (self.plan.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({name: round(value, 6) for name, value in line.items()}) + "\n")

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "clock": self.clock,
            "random": torch.get_rng_state(),
        }

    def _restore(self) -> None:
        state = load_checkpoint(self.plan.folder)
        if state is None:
            self.plan.folder.mkdir(parents=True, exist_ok=True)
            return
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.clock = state["step"], state["clock"]
        self.elapsed = self.clock
        if self.rank == 0:
            torch.set_rng_state(state["random"])
        else:
            torch.manual_seed(self.step * self.ranks + self.rank)  # another stream than rank 0's

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.stopping = True
