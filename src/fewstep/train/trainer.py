"""The training loop: one for all networks, resumable after any kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import InputError, NotFiniteError
from fewstep.files import partial_path
from fewstep.train.activation_checkpointing import checkpoint_blocks
from fewstep.train.checkpoint import load_checkpoint, save_checkpoint
from fewstep.train.distributed import average, join_ranks, shard
from fewstep.train.ema import Ema
from fewstep.train.forward_process import computing_in
from fewstep.train.metrics_logger import Journal
from fewstep.train.norms import norms_in_half
from fewstep.train.plan import Part, Plan, mixed_seed
from fewstep.train.replay import Replay
from fewstep.train.state_dicts import (
    State,
    check_finite,
    load_network,
    load_optimizer,
    network_state,
    optimizer_state,
)
from fewstep.train.stopping import Stop

MOST_BAD = 5
"""Steps without a finite gradient that end a run; each with one makes up for one without."""
SCALE, LEAST_SCALE, SCALE_STEPS = 2.0**14, 2.0, 1000
"""The first and the smallest factor of an fp16 loss, and after how many good steps it doubles."""

Loss = Callable[[Part], Mapping[str, Tensor]]
"""Named scalars, means over the part; the one called "loss" is made small, the others are only written down."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A network's turn in each step: what is trained and the loss that it is trained by.

    Parameters of `network` without `requires_grad` stay as they are. `rate` is relative to the plan's, `betas` and
    `weight_decay` are the plan's unless they are given. `kind`: of what kind a part's step is, where steps of one kind
    may be recorded and replayed on a card: the loss then reads of the host through `Part.inputs` alone.
    """

    network: nn.Module
    loss: Loss
    rate: float = 1.0
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    kind: Callable[[Part], Hashable] | None = None


class Pupil:
    """A network in training, with its optimizer and its moving average."""

    def __init__(self, turn: Turn, plan: Plan) -> None:
        self.turn, self.network = turn, turn.network
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.device = next(self.network.parameters()).device
        norms_in_half(self.network, plan.precision)
        if plan.checkpointing:
            checkpoint_blocks(self.network)
        if plan.sharing == "shard":
            shard(self.network)
            self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        if plan.compiled:
            self.network.compile()
        self.ema = Ema(self.network, plan.ema)
        self.scale, self.good = SCALE if plan.precision == "fp16" else 1.0, 0
        self.bad = 0  # steps without a finite gradient that no smaller scale would mend, less those after them
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=plan.rate,
            betas=turn.betas or plan.betas,
            weight_decay=plan.weight_decay if turn.weight_decay is None else turn.weight_decay,
            **_quickest(self.device, plan),
        )
        self.replay: Replay | None = None

    def gradients(self) -> list[Tensor]:
        """Of the last backward pass."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def forget(self) -> None:
        """Begin a step without gradients; a recorded one writes to where they are."""
        if self.replay is None:
            self.optimizer.zero_grad()
        elif gradients := self.gradients():
            torch._foreach_zero_(gradients)

    def advance(self, rate: float, *, finite: bool) -> None:
        """Take a step with the present gradients, or leave it out where they are not finite."""
        if finite:
            self.bad = max(0, self.bad - 1)
        elif self.scale <= LEAST_SCALE:
            self.bad += 1
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
            self.scale = max(LEAST_SCALE, self.scale / 2)
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
        for pupil in self.pupils.values():
            pupil.replay = self._replay(pupil)
        self.step, self.clock, self.elapsed = 0, 0.0, 0.0
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self.stopping, self._stop = False, Stop(self.ranks)
        self.journal = Journal(plan, on=self.rank == 0, waited=waited)
        self._restore()

    def run(self) -> None:
        """Train to the end of the plan.

        SIGINT or SIGTERM ends the run after the running step, with a checkpoint, from which the same call goes on; all
        ranks at the same step. A second one ends it at once. Single steps without a finite gradient are left out and
        counted; where they do not end, or end the run, `NotFiniteError` is raised, and the checkpoint before stays.
        """
        written = self.elapsed
        with self._stop.heard(), self.journal.shown():
            while not self.stopping and self.progress < 1:
                self.advance()
                if self.elapsed - written > self.plan.save_seconds and self._sound:  # the same on all ranks
                    self.save()
                    written = self.elapsed
            if self._sound:
                self.save()
            elif not self.stopping:
                raise NotFiniteError(f"the run ended on a step without a finite gradient: {self._advice()}")

    @property
    def _sound(self) -> bool:
        """Whether gradients are finite now; weights that give none are not saved."""
        return all(pupil.bad == 0 for pupil in self.pupils.values())

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1; the same on all ranks."""
        return self.plan.progress(self.step, self.elapsed)

    def averaged(self, name: str) -> State:
        """The averaged weights of a network, whole and on the CPU, for rank 0; a call of all ranks together.

        Raises `NotFiniteError` for weights that are NaN or infinite.
        """
        with self.pupils[name].ema.in_place():
            state = network_state(self.pupils[name].network)
        check_finite(f"the averaged {name}", state)
        return state

    def save(self) -> None:
        """Write a checkpoint; all ranks together. Raises `NotFiniteError`, and writes none, for weights of NaN."""
        state: dict[str, Any] = {name: pupil.state() for name, pupil in self.pupils.items()}
        for name, held in state.items():
            check_finite(f"{name} after step {self.step}", held["model"])
            check_finite(f"the averaged {name} after step {self.step}", held["ema"])
        self.saved = self.step
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
            self.plan.folder.mkdir(parents=True, exist_ok=True)
            with partial_path(self.plan.folder / f"sample-{self.step:08d}.png") as partial:
                sheet.save(partial, format="PNG")

    def _turn(self, pupil: Pupil, rate: float) -> dict[str, float]:
        """One network's part of a step, all others frozen; what its loss said."""
        pupil.forget()
        with self._frozen_but(pupil):
            said = [self._taken(pupil, part) for part in self.plan.parts(self.step, self.rank, self.ranks)]
        norm = self._agree(pupil)
        finite = bool(norm.isfinite())
        self.journal.skipped += not finite
        pupil.advance(rate, finite=finite)
        if pupil.bad >= MOST_BAD:
            loss = float(said[0]["loss"])
            raise NotFiniteError(
                f"step {self.step + 1}: the loss is {loss:.4g} and the norm of its gradients {float(norm):.4g}; of the "
                f"last steps {MOST_BAD} more had no finite gradient than had one: {self._advice()}"
            )
        if not self.journal.wants(self.step + 1):
            return {}
        means = {term: sum(float(terms[term]) for terms in said) / len(said) for term in said[0]}
        return means | {"norm": float(norm)}

    def _replay(self, pupil: Pupil) -> Replay | None:
        """What records a network's steps: on a card, where nothing in them changes but what its loss says."""
        plan, kind = self.plan, pupil.turn.kind
        steady = plan.precision != "fp16" and plan.sharing == "replicate"
        steady = steady and not plan.compiled and not plan.checkpointing
        if kind is None or not plan.replayed or not steady or pupil.device.type != "cuda":
            return None
        return Replay(lambda part: self._backward(pupil, part), kind, pupil.device)

    def _taken(self, pupil: Pupil, part: Part) -> Mapping[str, Tensor]:
        """The loss of a part, its gradients added to those there are; recorded before, or computed."""
        return self._backward(pupil, part) if pupil.replay is None else pupil.replay(part, pupil.gradients)

    def _backward(self, pupil: Pupil, part: Part) -> dict[str, Tensor]:
        """The loss of a part, its gradients added to those there are."""
        with computing_in(self.plan.precision, pupil.device):
            terms = pupil.turn.loss(part)
        if "loss" not in terms:
            raise InputError(f"a loss gave {', '.join(terms) or 'nothing'}; one of its scalars must be called loss")
        torch.autograd.backward(terms["loss"] * (pupil.scale / self.plan.accumulate))
        return {name: term.detach() for name, term in terms.items()}

    def _agree(self, pupil: Pupil) -> Tensor:
        """Average gradients and clock over the ranks, undo the loss's factor and clip; the norm before that."""
        gradients = pupil.gradients()
        whole = gradients if self.plan.sharing == "replicate" else []  # FSDP has averaged its own
        self.elapsed, stop = average(whole, (self.clock, float(self._stop.asked)))
        self.stopping = self.stopping or stop > 0
        if pupil.scale != 1.0:
            torch._foreach_mul_(gradients, 1 / pupil.scale)
        norm = nn.utils.clip_grad_norm_(pupil.parameters, self.plan.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _frozen_but(self, pupil: Pupil) -> _Frozen:
        return _Frozen([p for other in self.pupils.values() if other is not pupil for p in other.parameters])

    def _advice(self) -> str:
        """What to do where training has run away."""
        plan, fp16 = self.plan, "; fp16 may be too coarse: try plan.precision=bf16" * (self.plan.precision == "fp16")
        kept = "no checkpoint was written"
        if self.saved is not None:
            kept = f"the checkpoint of step {self.saved} in {plan.folder} stays, and training goes on from it"
        return (
            f"lower plan.rate (now {plan.rate:g}) or plan.clip (now {plan.clip:g}), or raise plan.warmup{fp16}; {kept}"
        )

    def _restore(self) -> None:
        state = load_checkpoint(self.plan.folder)
        if state is None:
            return
        for name, pupil in self.pupils.items():
            pupil.restore(state[name])
        self.step, self.clock, self.journal.skipped = state["step"], state["clock"], state["skipped"]
        self.elapsed, self.saved, self.journal.begun = self.clock, self.step, self.step


def _quickest(device: torch.device, plan: Plan) -> dict[str, bool]:
    """How AdamW computes: all in one kernel on a card, where the weights are whole."""
    return {"fused": True} if device.type == "cuda" and plan.sharing == "replicate" else {"foreach": True}


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
