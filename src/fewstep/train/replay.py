"""Forward and backward passes captured as CUDA graphs, which launch a small network's thousand kernels as one.

All that a loss draws or reads on the host goes through `MicroBatch.inputs`. A tape holds these tensors on the device
and refills them for each step; all else that the loss computes must depend on them alone, never synchronise with the
card, and be the same for all micro-batches of one kind. Then a replayed step gives what a computed one does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.train.plan import CPU, MicroBatch, to_device

WARMUPS = 2
"""Passes before the capture: libraries choose their kernels, and gradients get their memory."""
MOST = 8
"""Captured graphs of a network: each holds its memory. Steps of further shapes are computed."""

Tensors = Mapping[str, Tensor]
Backward = Callable[[MicroBatch], Tensors]
"""Computes a micro-batch's loss, adds its gradients to those there are, and returns the loss's terms."""


class Tape:
    """The host inputs of a loss in the order of reading: allocated on `device` once, refilled for each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.place = device, 0
        self.makes: list[tuple[MicroBatch, Callable[[MicroBatch], Tensors]]] = []
        self.held: list[Tensors] = []

    def read(self, micro_batch: MicroBatch, make: Callable[[MicroBatch], Tensors]) -> Tensors:
        """See `Inputs`: the next tensors of the tape; in the first pass they are made and recorded."""
        if self.place == len(self.held):
            host = replace(micro_batch, device=CPU, tape=None)
            self.makes.append((host, make))
            self.held.append({name: to_device(value, self.device) for name, value in make(host).items()})
        self.place += 1
        return self.held[self.place - 1]

    def made(self, step: int) -> Sequence[Tensors]:
        """The host inputs of step `step`, on the CPU; may be called by another thread."""
        return [make(replace(micro_batch, step=step)) for micro_batch, make in self.makes]

    def fill(self, made: Sequence[Tensors]) -> None:
        """Copy the result of `made` into the tape's tensors."""
        for values, held in zip(made, self.held, strict=True):
            for name, value in values.items():
                on_card = self.device.type == "cuda"
                held[name].copy_(value.pin_memory() if on_card else value, non_blocking=on_card)


class RecordedStep:
    """One kind of step: a CUDA graph on a card, elsewhere computed again from the tape's tensors."""

    def __init__(self, backward: Backward, micro_batch: MicroBatch, device: torch.device) -> None:
        self.tape = Tape(device)
        self._backward, self._part = backward, replace(micro_batch, device=device, tape=self.tape)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._terms = self._captured() if device.type == "cuda" else self._run()

    def play(self, made: Sequence[Tensors]) -> Tensors:
        """The loss's terms for host inputs `made`; the gradients are added to those there are."""
        self.tape.fill(made)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return {name: term.clone() for name, term in self._terms.items()}

    def _run(self) -> Tensors:
        self.tape.place = 0
        return self._backward(self._part)

    def _captured(self) -> Tensors:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.tape.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            # other threads, which read the next step's data, may call CUDA in the meantime
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                terms = self._run()
        finally:
            torch.backends.cudnn.benchmark = before
        self._graph = graph
        return terms


class Replay:
    """The captured steps of one network, by their kind and the shapes of their host inputs.

    The host inputs of the next step are made while this one computes.
    """

    def __init__(self, backward: Backward, kind: Callable[[MicroBatch], Hashable], device: torch.device) -> None:
        self.backward, self.kind, self.device = backward, kind, device
        self.tapes: dict[Hashable, Tape] = {}
        self.recorded: dict[Hashable, RecordedStep] = {}
        self.coming: dict[MicroBatch, Future[Sequence[Tensors]]] = {}
        self.maker = ThreadPoolExecutor(1, thread_name_prefix="inputs")

    def __call__(self, micro_batch: MicroBatch, gradients: Callable[[], list[Tensor]]) -> Tensors:
        """The loss's terms; the micro-batch's gradients are added to `gradients()`."""
        made = self._made(micro_batch)
        key = self._key(micro_batch), None if made is None else _shapes(made)
        if made is None or (key not in self.recorded and len(self.recorded) < MOST):
            recorded = self._record(micro_batch, gradients)
            made = recorded.tape.made(micro_batch.step)
            key = self._key(micro_batch), _shapes(made)
            self.recorded[key] = recorded
            self.tapes[self._key(micro_batch)] = recorded.tape
        if key not in self.recorded:
            return self.backward(micro_batch)
        terms = self.recorded[key].play(made)
        self._prepare(replace(micro_batch, step=micro_batch.step + 1))
        return terms

    def _record(self, micro_batch: MicroBatch, gradients: Callable[[], list[Tensor]]) -> RecordedStep:
        """Capture one kind of step; the gradients stay as they were."""
        before = {id(gradient): gradient.clone() for gradient in gradients()}
        recorded = RecordedStep(self.backward, micro_batch, self.device)
        for gradient in gradients():  # those that were there are the same tensors now
            gradient.copy_(before.get(id(gradient), torch.zeros_like(gradient)))
        return recorded

    def _key(self, micro_batch: MicroBatch) -> Hashable:
        return micro_batch.first, micro_batch.count, self.kind(micro_batch)

    def _made(self, micro_batch: MicroBatch) -> Sequence[Tensors] | None:
        """The host inputs of a step; None where no step of its kind has been captured."""
        coming, tape = self.coming.pop(micro_batch, None), self.tapes.get(self._key(micro_batch))
        if coming is not None:
            return coming.result()
        return None if tape is None else tape.made(micro_batch.step)

    def _prepare(self, micro_batch: MicroBatch) -> None:
        tape = self.tapes.get(self._key(micro_batch))
        if tape is not None:
            self.coming[micro_batch] = self.maker.submit(tape.made, micro_batch.step)


def _shapes(made: Sequence[Tensors]) -> Hashable:
    return tuple((name, value.shape) for values in made for name, value in values.items())
