"""The training loop: one for all networks, resumable after any kill."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import NotFiniteError
from fewstep.train.checkpoint import load_checkpoint, save_checkpoint
from fewstep.train.ema import Ema
from fewstep.train.journal import Journal
from fewstep.train.memory import checkpoint_blocks
from fewstep.train.plan import Part, Plan, mixed_seed
from fewstep.train.process import computing_in
from fewstep.train.ranks import average, join_ranks, shard
from fewstep.train.states import State, load_network, load_optimizer, network_state, optimizer_state

MOST_SKIPPED = 20
"""Steps in a row without a finite gradient that end a run."""
SCALE, SCALE_STEPS = 2.0**14, 1000
"""The first factor of an fp16 loss, and after how many good steps it doubles."""

Loss = Callable[[Part], Mapping[str, Tensor]]
"""Named scalars, means over the part; the one called "loss" is made small, the others are only written down."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A network's turn in each step: what is trained and the loss that it is trained by.

    Parameters of `network` without `requires_grad` stay as they are. `rate` is relative to the plan's, `betas` and
    `weight_decay` are the plan's unless they are given.
    """

    network: nn.Module
    loss: Loss
    rate: float = 1.0
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None


class Pupil:
    """A network in training, with its optimizer and its moving average."""

    def __init__(self, turn: Turn, plan: Plan) -> None:
        self.turn, self.network = turn, turn.network
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        if plan.checkpointing:
            checkpoint_blocks(self.network)
        if plan.sharing == "shard":
            shard(self.network)
            self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        if plan.compiled:
            self.network.compile()
        self.ema = Ema(self.network, plan.ema)
        self.skipped, self.scale, self.good = 0, SCALE if plan.precision == "fp16" else 1.0, 0
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=plan.rate,
            betas=turn.betas or plan.betas,
            weight_decay=plan.weight_decay if turn.weight_decay is None else turn.weight_decay,
            foreach=True,
        )

    def gradients(self) -> list[Tensor]:
        """Of the last backward pass."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def advance(self, rate: float, *, finite: bool) -> None:
        """Take a step with the present gradients, or leave it out where they are not finite."""
        self.skipped = 0 if finite else self.skipped + 1
        self._rescale(finite)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * self.turn.rate
            self.optimizer.step()
            self.ema.update()

    def state(self) -> State:
        """All that the next step depends on."""
        with self.ema.in_place():
            averaged = network_state(self.network)
        return {
            "model": network_state(self.network),
            "ema": averaged,
            "optimizer": optimizer_state(self.network, self.optimizer),
            "numbers": [self.ema.updates, self.scale, self.good],
        }

    def restore(self, state: State) -> None:
        """Go on from what `state` gave."""
        load_network(self.network, state["ema"])
        self.ema.averages = [parameter.detach().clone() for parameter in self.network.parameters()]
        load_network(self.network, state["model"])
        load_optimizer(self.network, self.optimizer, state["optimizer"])
        self.ema.updates, self.scale, self.good = state["numbers"]

    def _rescale(self, finite: bool) -> None:
        """Keep the factor of an fp16 loss as large as its gradients stay finite."""
        if self.scale == 1.0:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(2.0, self.scale / 2)
        elif self.good % SCALE_STEPS == 0:
            self.scale *= 2


class Trainer:
    """Networks in training by turns, and the clock; `run` trains, and goes on where the last run stopped.

    Under `torchrun` every rank has one; rank 0 writes. Everything random is a function of the plan's seed and the
    step, as long as losses draw from their `Part`: N steps are N/2, a kill and N/2 again, to the bit on a CPU.
    """

    def __init__(
        self,
        turns: Mapping[str, Turn],
        plan: Plan,
        *,
        waited: Callable[[], float] = lambda: 0.0,
        sample: Callable[[Trainer], Image.Image] | None = None,
    ) -> None:
        self.plan, self.sample = plan, sample
        self.rank, self.ranks = join_ranks()
        plan.parts(0, self.rank, self.ranks)  # refuses a batch that cannot be shared out
        self.pupils = {name: Pupil(turn, plan) for name, turn in turns.items()}
        self.step, self.clock, self.elapsed = 0, 0.0, 0.0
        self.stopping = False
        self.journal = Journal(plan, on=self.rank == 0, waited=waited)
        self._restore()

    def run(self) -> None:
        """Train to the end of the plan.

        SIGTERM ends the run early with a checkpoint, from which the same call goes on. Raises `NotFiniteError` when 20
        steps in a row have no finite gradient; single ones are left out and counted.
        """
        saved, before = self.elapsed, signal.signal(signal.SIGTERM, self._stop)
        try:
            with self.journal.shown():
                while not self.stopping and self.progress < 1:
                    self.advance()
                    if self.elapsed - saved > self.plan.save_seconds:  # the same on all ranks
                        self.save()
                        saved = self.elapsed
        finally:
            signal.signal(signal.SIGTERM, before)
        self.save()

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1; the same on all ranks."""
        return self.plan.progress(self.step, self.elapsed)

    def averaged(self, name: str) -> State:
        """The averaged weights of a network, whole and on the CPU, for rank 0; a call of all ranks together."""
        with self.pupils[name].ema.in_place():
            return network_state(self.pupils[name].network)

    def save(self) -> None:
        """Write a checkpoint; all ranks together."""
        state: dict[str, Any] = {name: pupil.state() for name, pupil in self.pupils.items()}
        if self.rank == 0:
            state |= {"step": self.step, "clock": self.clock, "skipped": self.journal.skipped}
            save_checkpoint(self.plan.folder, self.step, state, keep=self.plan.keep)

    def rehearse(self) -> None:
        """Compute a step's losses and gradients and forget them: to see what it costs."""
        for pupil in self.pupils.values():
            with self._frozen_but(pupil):
                for part in self.plan.parts(self.step, self.rank, self.ranks):
                    self._backward(pupil, part)
            pupil.optimizer.zero_grad()

    def advance(self) -> None:
        """One step: each network's turn."""
        started = time.monotonic()
        torch.manual_seed(mixed_seed(self.plan.seed, self.step, self.rank))  # for what does not draw from its part
        rate = self.plan.rate_at(self.step, self.progress)
        numbers: dict[str, float] = {"rate": rate}
        for name, pupil in self.pupils.items():
            terms = self._turn(pupil, rate)
            numbers |= {term if len(self.pupils) == 1 else f"{name}.{term}": value for term, value in terms.items()}
        self.step += 1
        self.clock = self.elapsed + time.monotonic() - started
        self.journal.write(self.step, self.elapsed, numbers)
        if self.sample is not None and self.plan.sample_steps and self.step % self.plan.sample_steps == 0:
            self._draw(self.sample)

    def _draw(self, sample: Callable[[Trainer], Image.Image]) -> None:
        """Keep a sheet of what the averaged networks draw."""
        with ExitStack() as stack:
            for pupil in self.pupils.values():
                stack.enter_context(pupil.ema.in_place())
            sheet = sample(self)
        if self.rank == 0:
            sheet.save(self.plan.folder / f"sample-{self.step:08d}.png")

    def _turn(self, pupil: Pupil, rate: float) -> dict[str, float]:
        """One network's part of a step, all others frozen; what its loss said."""
        pupil.optimizer.zero_grad()
        with self._frozen_but(pupil):
            said = [self._backward(pupil, part) for part in self.plan.parts(self.step, self.rank, self.ranks)]
        norm = self._agree(pupil)
        pupil.advance(rate, finite=bool(norm.isfinite()))
        if pupil.skipped:
            self.journal.skipped += 1
        if pupil.skipped >= MOST_SKIPPED:
            raise NotFiniteError(
                f"training: no finite gradient in the {MOST_SKIPPED} steps up to {self.step + 1}; lower the rate"
            )
        if not self.journal.wants(self.step + 1):
            return {}
        means = {term: sum(float(terms[term]) for terms in said) / len(said) for term in said[0]}
        return means | {"norm": float(norm)}

    def _backward(self, pupil: Pupil, part: Part) -> dict[str, Tensor]:
        """The loss of a part, its gradients added to those there are."""
        with computing_in(self.plan.precision, next(pupil.network.parameters()).device):
            terms = pupil.turn.loss(part)
        torch.autograd.backward(terms["loss"] * (pupil.scale / self.plan.accumulate))
        return {name: term.detach() for name, term in terms.items()}

    def _agree(self, pupil: Pupil) -> Tensor:
        """Average gradients and clock over the ranks, undo the loss's factor and clip; the norm before that."""
        gradients = pupil.gradients()
        whole = gradients if self.plan.sharing == "replicate" else []  # FSDP has averaged its own
        self.elapsed, stop = average(whole, (self.clock, float(self.stopping)))
        self.stopping = stop > 0
        if pupil.scale != 1.0:
            torch._foreach_mul_(gradients, 1 / pupil.scale)
        norm = nn.utils.clip_grad_norm_(pupil.parameters, self.plan.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _frozen_but(self, pupil: Pupil) -> _Frozen:
        return _Frozen([p for other in self.pupils.values() if other is not pupil for p in other.parameters])

    def _restore(self) -> None:
        state = load_checkpoint(self.plan.folder)
        if state is None:
            self.plan.folder.mkdir(parents=True, exist_ok=True)
            return
        for name, pupil in self.pupils.items():
            pupil.restore(state[name])
        self.step, self.clock, self.journal.skipped = state["step"], state["clock"], state["skipped"]
        self.elapsed = self.clock

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.stopping = True


class _Frozen:
    """Parameters that gradients pass by, until the context ends."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
