"""The training loop: any number of networks, each with its objective; resumable after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import InputError, NotFiniteError
from fewstep.files import partial_path
from fewstep.train.activation_checkpointing import checkpoint_blocks
from fewstep.train.checkpoint import load_checkpoint, save_checkpoint
from fewstep.train.distributed import average, init_ranks, shard
from fewstep.train.ema import Ema
from fewstep.train.forward_process import computing_in
from fewstep.train.metrics_logger import MetricsLogger
from fewstep.train.norms import norms_in_half
from fewstep.train.plan import MicroBatch, Plan, mixed_seed
from fewstep.train.replay import Replay
from fewstep.train.state_dicts import (
    State,
    check_finite,
    load_network,
    load_optimizer,
    network_state,
    optimizer_state,
)
from fewstep.train.stopping import StopSignal

MAX_BAD_STEPS = 5
"""Steps without a finite gradient that end a run, less those with one."""
SCALE, LEAST_SCALE, SCALE_STEPS = 2.0**14, 2.0, 1000
"""The first and the smallest factor of an fp16 loss, and after how many good steps it doubles."""

Loss = Callable[[MicroBatch], Mapping[str, Tensor]]
"""Named scalars, means over the micro-batch; the one called "loss" is minimised, the others are only logged."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A network to train and the loss to train it by.

    Parameters of `network` without `requires_grad` stay as they are. `lr_multiplier` times the plan's learning rate is
    the network's; `betas` and `weight_decay` are the plan's unless they are given. `kind`: micro-batches with equal
    kinds have the same computation, which may then be captured as a CUDA graph on a card; the loss then reads from the
    host through `MicroBatch.inputs` alone. None: never captured.
    """

    network: nn.Module
    loss: Loss
    lr_multiplier: float = 1.0
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    kind: Callable[[MicroBatch], Hashable] | None = None


class TrainState:
    """A network in training, with its optimizer, its moving average and its loss scale."""

    def __init__(self, objective: Objective, plan: Plan) -> None:
        self.objective, self.network = objective, objective.network
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.device = next(self.network.parameters()).device
        norms_in_half(self.network, plan.precision)
        if plan.activation_checkpointing:
            checkpoint_blocks(self.network)
        if plan.parallelism == "shard":
            shard(self.network)
            self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        if plan.compile:
            self.network.compile()
        self.ema = Ema(self.network, plan.ema_decay)
        self.scale, self.good = SCALE if plan.precision == "fp16" else 1.0, 0
        self.bad = 0  # steps without a finite gradient that no smaller scale would mend, less those after them
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=plan.learning_rate,
            betas=objective.betas or plan.betas,
            weight_decay=plan.weight_decay if objective.weight_decay is None else objective.weight_decay,
            **_adamw_kernels(self.device, plan),
        )
        self.replay: Replay | None = None

    def gradients(self) -> list[Tensor]:
        """The gradients of the last backward pass."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def zero_grad(self) -> None:
        """Clear the gradients; a captured step writes to their memory, so there they are set to zero."""
        if self.replay is None:
            self.optimizer.zero_grad()
        elif gradients := self.gradients():
            torch._foreach_zero_(gradients)

    def advance(self, rate: float, *, finite: bool) -> None:
        """Take an optimizer step with the present gradients, or skip it where they are not finite."""
        if finite:
            self.bad = max(0, self.bad - 1)
        elif self.scale <= LEAST_SCALE:
            self.bad += 1
        self._rescale(finite)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * self.objective.lr_multiplier
            self.optimizer.step()
            self.ema.update()

    def state_dict(self) -> State:
        """All that the next step depends on."""
        with self.ema.in_place():
            averaged = network_state(self.network)
        return {
            "model": network_state(self.network),
            "ema": averaged,
            "optimizer": optimizer_state(self.network, self.optimizer),
            "numbers": [self.ema.updates, self.scale, self.good],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from the result of `state_dict`."""
        load_network(self.network, state["ema"])
        self.ema.averages = [parameter.detach().clone() for parameter in self.network.parameters()]
        load_network(self.network, state["model"])
        load_optimizer(self.network, self.optimizer, state["optimizer"])
        self.ema.updates, self.scale, self.good = state["numbers"]

    def _rescale(self, finite: bool) -> None:
        """Adapt the fp16 loss scale: halve it after a non-finite step, double it after `SCALE_STEPS` finite ones."""
        if self.scale == 1.0:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(LEAST_SCALE, self.scale / 2)
        elif self.good % SCALE_STEPS == 0:
            self.scale *= 2


class Trainer:
    """Trains networks by their objectives, one after another in each step; `run` resumes where the last run stopped.

    Under `torchrun` every rank has one; rank 0 writes. Everything random is a function of the plan's seed and the
    step, as long as losses draw from their `MicroBatch`: N steps are N/2, a kill and N/2 again, to the bit on a CPU.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        plan: Plan,
        *,
        waited_seconds: Callable[[], float] = lambda: 0.0,
        sample: Callable[[Trainer], Image.Image] | None = None,
    ) -> None:
        self.plan, self.sample = plan, sample
        self.rank, self.ranks = init_ranks()
        plan.micro_batches(0, self.rank, self.ranks)  # refuses a batch that cannot be shared out
        self.states = {name: TrainState(objective, plan) for name, objective in objectives.items()}
        for state in self.states.values():
            state.replay = self._replay(state)
        self.step, self.clock, self.elapsed = 0, 0.0, 0.0
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self.stopping, self._stop = False, StopSignal(self.ranks)
        self.metrics = MetricsLogger(plan, on=self.rank == 0, waited_seconds=waited_seconds)
        self._restore()

    def run(self) -> None:
        """Train to the end of the plan.

        SIGINT or SIGTERM ends the run after the running step, with a checkpoint, from which the same call goes on; all
        ranks at the same step. A second one ends it at once. Single steps without a finite gradient are left out and
        counted; where they do not end, or end the run, `NotFiniteError` is raised, and the checkpoint before stays.
        """
        written = self.elapsed
        with self._stop.listening(), self.metrics.shown():
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
        """Whether the last gradients were finite; weights that give none are not saved."""
        return all(state.bad == 0 for state in self.states.values())

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1; the same on all ranks."""
        return self.plan.progress(self.step, self.elapsed)

    def averaged(self, name: str) -> State:
        """The averaged weights of a network, whole and on the CPU, for rank 0; a call of all ranks together.

        Raises `NotFiniteError` for weights that are NaN or infinite.
        """
        with self.states[name].ema.in_place():
            weights = network_state(self.states[name].network)
        check_finite(f"the averaged {name}", weights)
        return weights

    def save(self) -> None:
        """Write a checkpoint; all ranks together. Raises `NotFiniteError`, and writes none, for weights of NaN."""
        checkpoint: State = {name: state.state_dict() for name, state in self.states.items()}
        for name, network in checkpoint.items():
            check_finite(f"{name} after step {self.step}", network["model"])
            check_finite(f"the averaged {name} after step {self.step}", network["ema"])
        self.saved = self.step
        if self.rank == 0:
            checkpoint |= {"step": self.step, "clock": self.clock, "skipped": self.metrics.skipped}
            save_checkpoint(self.plan.folder, self.step, checkpoint, keep=self.plan.keep_checkpoints)

    def dry_step(self) -> None:
        """Compute a step's losses and gradients and discard them: to measure its time and memory."""
        for state in self.states.values():
            with self._frozen_except(state):
                for micro_batch in self.plan.micro_batches(self.step, self.rank, self.ranks):
                    self._backward(state, micro_batch)
            state.optimizer.zero_grad()

    def advance(self) -> None:
        """One step of every network, in the order of the objectives."""
        started = time.monotonic()
        torch.manual_seed(mixed_seed(self.plan.seed, self.step, self.rank))  # for losses with global randomness
        rate = self.plan.learning_rate_at(self.step, self.progress)
        numbers: dict[str, float] = {"rate": rate}
        for name, state in self.states.items():
            terms = self._train_step(state, rate)
            numbers |= {term if len(self.states) == 1 else f"{name}.{term}": value for term, value in terms.items()}
        self.step += 1
        self.clock = self.elapsed + time.monotonic() - started
        self.metrics.write(self.step, self.elapsed, numbers)
        if self.sample is not None and self.plan.sample_steps and self.step % self.plan.sample_steps == 0:
            self._save_sample(self.sample)

    def _save_sample(self, sample: Callable[[Trainer], Image.Image]) -> None:
        """Save a sheet of samples of the averaged networks as `sample-<step>.png`."""
        with ExitStack() as stack:
            for state in self.states.values():
                stack.enter_context(state.ema.in_place())
            sheet = sample(self)
        if self.rank == 0:
            self.plan.folder.mkdir(parents=True, exist_ok=True)
            with partial_path(self.plan.folder / f"sample-{self.step:08d}.png") as partial:
                sheet.save(partial, format="PNG")

    def _train_step(self, state: TrainState, rate: float) -> dict[str, float]:
        """One network's step, all others frozen; the means of its loss terms where this step is logged."""
        state.zero_grad()
        with self._frozen_except(state):
            losses = [
                self._computed(state, micro_batch)
                for micro_batch in self.plan.micro_batches(self.step, self.rank, self.ranks)
            ]
        norm = self._sync_and_clip(state)
        finite = bool(norm.isfinite())
        self.metrics.skipped += not finite
        state.advance(rate, finite=finite)
        if state.bad >= MAX_BAD_STEPS:
            loss = float(losses[0]["loss"])
            raise NotFiniteError(
                f"step {self.step + 1}: the loss is {loss:.4g} and the norm of its gradients {float(norm):.4g}; of the "
                f"last steps {MAX_BAD_STEPS} more had no finite gradient than had one: {self._advice()}"
            )
        if not self.metrics.wants(self.step + 1):
            return {}
        averages = {term: sum(float(terms[term]) for terms in losses) / len(losses) for term in losses[0]}
        return averages | {"norm": float(norm)}

    def _replay(self, state: TrainState) -> Replay | None:
        """The CUDA graphs of a network's steps; None where its plan, objective or device does not allow them."""
        plan, kind = self.plan, state.objective.kind
        steady = plan.precision != "fp16" and plan.parallelism == "replicate"
        steady = steady and not plan.compile and not plan.activation_checkpointing
        if kind is None or not plan.cuda_graphs or not steady or state.device.type != "cuda":
            return None
        return Replay(lambda micro_batch: self._backward(state, micro_batch), kind, state.device)

    def _computed(self, state: TrainState, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """The loss terms of a micro-batch, replayed or computed; its gradients are added."""
        return (
            self._backward(state, micro_batch) if state.replay is None else state.replay(micro_batch, state.gradients)
        )

    def _backward(self, state: TrainState, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """The loss terms of a micro-batch; its gradients are added to those there are."""
        with computing_in(self.plan.precision, state.device):
            terms = state.objective.loss(micro_batch)
        if "loss" not in terms:
            raise InputError(f"a loss gave {', '.join(terms) or 'nothing'}; one of its scalars must be called loss")
        torch.autograd.backward(terms["loss"] * (state.scale / self.plan.gradient_accumulation))
        return {name: term.detach() for name, term in terms.items()}

    def _sync_and_clip(self, state: TrainState) -> Tensor:
        """Average gradients and clock over the ranks, undo the loss scale and clip; the norm before clipping."""
        gradients = state.gradients()
        whole = gradients if self.plan.parallelism == "replicate" else []  # FSDP has averaged its own
        self.elapsed, stop = average(whole, (self.clock, float(self._stop.requested)))
        self.stopping = self.stopping or stop > 0
        if state.scale != 1.0:
            torch._foreach_mul_(gradients, 1 / state.scale)
        norm = nn.utils.clip_grad_norm_(state.parameters, self.plan.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _frozen_except(self, state: TrainState) -> _Frozen:
        return _Frozen([p for other in self.states.values() if other is not state for p in other.parameters])

    def _advice(self) -> str:
        """What to change after divergence, and which checkpoint remains."""
        plan, fp16 = self.plan, "; fp16 may be too coarse: try plan.precision=bf16" * (self.plan.precision == "fp16")
        checkpoint = "no checkpoint was written"
        if self.saved is not None:
            checkpoint = f"the checkpoint of step {self.saved} in {plan.folder} stays, and training goes on from it"
        return (
            f"lower plan.learning_rate (now {plan.learning_rate:g}) or "
            f"plan.max_grad_norm (now {plan.max_grad_norm:g}), or raise plan.warmup_steps{fp16}; {checkpoint}"
        )

    def _restore(self) -> None:
        checkpoint = load_checkpoint(self.plan.folder)
        if checkpoint is None:
            return
        for name, state in self.states.items():
            state.load_state_dict(checkpoint[name])
        self.step, self.clock, self.metrics.skipped = checkpoint["step"], checkpoint["clock"], checkpoint["skipped"]
        self.elapsed, self.saved, self.metrics.begun = self.clock, self.step, self.step


def _adamw_kernels(device: torch.device, plan: Plan) -> dict[str, bool]:
    """AdamW's implementation: fused on a card where the weights are replicated, else by lists of tensors."""
    return {"fused": True} if device.type == "cuda" and plan.parallelism == "replicate" else {"foreach": True}


class _Frozen:
    """A context in which `parameters` do not require gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
