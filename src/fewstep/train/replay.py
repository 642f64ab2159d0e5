"""Steps of training recorded as CUDA graphs: a small network's thousand kernels are then launched as one.

What a loss draws and reads of the host goes through `MicroBatch.inputs`. A tape holds these tensors on the device, and fills
them anew for each step; all else that the loss computes must depend on them alone, wait for nothing on the card, and be
the same for all parts of one kind. Then a recorded step gives what a computed one does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.train.plan import CPU, MicroBatch, to_device

WARMUPS = 2
"""Passes before one is recorded: libraries choose their kernels, and gradients get their memory."""
MOST = 8
"""Recorded steps of a network: each holds its memory. Others, of pictures in many sizes, are computed."""

Tensors = Mapping[str, Tensor]
Backward = Callable[[MicroBatch], Tensors]
"""Computes a part's loss, adds its gradients to those there are, and gives the loss's terms."""


class Tape:
    """What a loss draws of a part, in its order: on `device` once, and filled anew for each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.place = device, 0
        self.makes: list[tuple[MicroBatch, Callable[[MicroBatch], Tensors]]] = []
        self.held: list[Tensors] = []

    def read(self, micro_batch: MicroBatch, make: Callable[[MicroBatch], Tensors]) -> Tensors:
        """See `Inputs`: the next of what is held; the first time round it is made."""
        if self.place == len(self.held):
            host = replace(micro_batch, device=CPU, tape=None)
            self.makes.append((host, make))
            self.held.append({name: to_device(value, self.device) for name, value in make(host).items()})
        self.place += 1
        return self.held[self.place - 1]

    def made(self, step: int) -> Sequence[Tensors]:
        """All that a step needs of the CPU; may be called by another thread."""
        return [make(replace(micro_batch, step=step)) for micro_batch, make in self.makes]

    def fill(self, made: Sequence[Tensors]) -> None:
        """Put what `made` gave in the place of what is held."""
        for values, held in zip(made, self.held, strict=True):
            for name, value in values.items():
                on_card = self.device.type == "cuda"
                held[name].copy_(value.pin_memory() if on_card else value, non_blocking=on_card)


class RecordedStep:
    """One kind of step. On a card it is a CUDA graph; elsewhere it is computed again from what the tape holds."""

    def __init__(self, backward: Backward, micro_batch: MicroBatch, device: torch.device) -> None:
        self.tape = Tape(device)
        self._backward, self._part = backward, replace(micro_batch, device=device, tape=self.tape)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._terms = self._captured() if device.type == "cuda" else self._run()

    def play(self, made: Sequence[Tensors]) -> Tensors:
        """The terms of the step that `made` belongs to; its gradients are added."""
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
    """The recorded steps of one network, by their kind and the shapes of what they read of the host.

    What the next step needs is made while this one computes.
    """

    def __init__(self, backward: Backward, kind: Callable[[MicroBatch], Hashable], device: torch.device) -> None:
        self.backward, self.kind, self.device = backward, kind, device
        self.tapes: dict[Hashable, Tape] = {}
        self.recorded: dict[Hashable, RecordedStep] = {}
        self.coming: dict[MicroBatch, Future[Sequence[Tensors]]] = {}
        self.maker = ThreadPoolExecutor(1, thread_name_prefix="inputs")

    def __call__(self, micro_batch: MicroBatch, gradients: Callable[[], list[Tensor]]) -> Tensors:
        """The loss's terms; the part's gradients are added to `gradients()`."""
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
        """A kind of step; the gradients stay as they were."""
        before = {id(gradient): gradient.clone() for gradient in gradients()}
        recorded = RecordedStep(self.backward, micro_batch, self.device)
        for gradient in gradients():  # those that were there are the same tensors now
            gradient.copy_(before.get(id(gradient), torch.zeros_like(gradient)))
        return recorded

    def _key(self, micro_batch: MicroBatch) -> Hashable:
        return micro_batch.first, micro_batch.count, self.kind(micro_batch)

    def _made(self, micro_batch: MicroBatch) -> Sequence[Tensors] | None:
        """What a step needs of the host; None where no step of its kind has been recorded."""
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
