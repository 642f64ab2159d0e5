"""What is timed: each contender loads one part of a model in a process of its own, and runs it when it is told to."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Run = Callable[[], Any]


class Task(NamedTuple):
    """A part ("decode", "encode" or "unet") of the model in `folder`, for `batch` pictures of `size` pixels."""

    folder: Path
    part: str
    size: int
    batch: int
    threads: int


class Told(NamedTuple):
    """What a contender says when it is ready, and after each run."""

    seconds: float
    peak_bytes: int
    output: Any = None


def serve(name: str, task: Task, line: Connection) -> None:
    """Load, say how long that took, then run once for each message until the line closes."""
    try:
        started = time.perf_counter()
        run = CONTENDERS[name].load(task)
        line.send(Told(time.perf_counter() - started, _peak()))
        while line.recv():
            started = time.perf_counter()
            output = run()
            line.send(Told(time.perf_counter() - started, _peak(), output))
    except EOFError:
        pass
    except Exception as error:  # whatever a peer raises is a row of the table
        line.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _example(task: Task) -> tuple[Any, ...]:
    import json

    from benchmarks.speed.models import inputs

    widths = (0, 0)
    if task.part == "unet":
        config = json.loads((task.folder / "unet" / "config.json").read_text(encoding="utf-8"))
        addition = config.get("projection_class_embeddings_input_dim")
        widths = config["cross_attention_dim"], (addition - 6 * 256 if addition else 0)
    return inputs(task.part, task.size, task.batch, widths)


def _fewstep(task: Task, *, plain: bool = False, **options: Any) -> Run:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from fewstep.engines.cpu.engine import CpuEngine
    from fewstep.engines.eager import EagerEngine
    from fewstep.engines.engine import Conditioning
    from fewstep.weights.load import load_parts

    torch.set_num_threads(task.threads)
    engine = (EagerEngine if plain else CpuEngine)(load_parts(task.folder, dtype=torch.float32), **options)
    example = _example(task)

    @torch.inference_mode()
    def run() -> Any:
        if task.part == "decode":
            return engine.decode(example[0] * engine.parts.autoencoder.config.scaling_factor).numpy()
        if task.part == "encode":
            return engine.encode(example[0])[0].numpy() / engine.parts.autoencoder.config.scaling_factor
        x, t, context, *added = example
        pooled, sizes = added or (None, None)
        told = Conditioning(context=context, pooled=pooled, sizes=sizes)
        return engine.predict(x, float(t[0]), told).numpy()

    return run


def _theirs(task: Task) -> tuple[Any, Any]:
    """Diffusers' part as a module of tensors alone, and its example."""
    import diffusers
    import torch

    torch.set_num_threads(task.threads)
    if task.part == "unet":
        network = diffusers.UNet2DConditionModel.from_pretrained(task.folder, subfolder="unet")
    else:
        network = diffusers.AutoencoderKL.from_pretrained(task.folder, subfolder="vae")

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.eval()

        def forward(self, x: Any, t: Any = None, context: Any = None, pooled: Any = None, sizes: Any = None) -> Any:
            if task.part == "decode":
                return self.network.decode(x, return_dict=False)[0]
            if task.part == "encode":
                return self.network.encode(x, return_dict=False)[0].mean
            told = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
            return self.network(x, t, context, added_cond_kwargs=told, return_dict=False)[0]

    return Part().requires_grad_(False), _example(task)


def _diffusers(task: Task, *, channels_last: bool = True, huge_pages: bool = True, compiled: bool = False) -> Run:
    if huge_pages:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    network, (x, *told) = _theirs(task)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network)

    @torch.inference_mode()
    def run() -> Any:
        return network(x, *told).numpy()

    return run


def _openvino(task: Task) -> Run:
    import openvino
    import torch

    network, example = _theirs(task)
    with torch.no_grad():
        model = openvino.convert_model(network, example_input=tuple(example))
    model.reshape({i: list(value.shape) for i, value in enumerate(example)})
    del network
    settings = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    values = [value.numpy() for value in example]
    return lambda: request.infer(values, share_inputs=True)[0].copy()


def _onnxruntime(task: Task) -> Run:
    import onnxruntime
    import torch

    path = task.folder / "onnx" / f"{task.part}-{task.size}-{task.batch}" / "model.onnx"
    network, example = _theirs(task)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(network, tuple(example), path, dynamo=True, external_data=True, optimize=True)
    del network
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    values = {given.name: value.numpy() for given, value in zip(session.get_inputs(), example, strict=True)}
    return lambda: session.run(None, values)[0]


class Contender(NamedTuple):
    """How it loads a task, the packages whose versions name it, and how to get them."""

    load: Callable[[Task], Run]
    packages: Sequence[str]
    peer: bool = True

    def said(self) -> str:
        """`openvino 2026.4.1`: its packages, which must be installed."""
        return ", ".join(f"{name} {version(name)}" for name in self.packages)

    def missing(self) -> str | None:
        """What to install, where something is not."""
        for name in self.packages:
            try:
                version(name)
            except PackageNotFoundError:
                return f"pip install {' '.join(self.packages)}"
        return None


def _with(load: Callable[..., Run], **options: Any) -> Callable[[Task], Run]:
    return lambda task: load(task, **options)


CONTENDERS = {
    "fewstep": Contender(_fewstep, ("fewstep", "torch"), peer=False),
    "fewstep, plain engine": Contender(_with(_fewstep, plain=True), ("fewstep", "torch"), peer=False),
    "fewstep, strict": Contender(_with(_fewstep, strict=True), ("fewstep", "torch"), peer=False),
    "diffusers": Contender(_with(_diffusers, channels_last=False, huge_pages=False), ("diffusers", "torch")),
    "diffusers, channels last, huge pages": Contender(_diffusers, ("diffusers", "torch")),
    "diffusers, torch.compile": Contender(_with(_diffusers, compiled=True), ("diffusers", "torch")),
    "openvino": Contender(_openvino, ("openvino", "diffusers")),
    "onnxruntime": Contender(_onnxruntime, ("onnxruntime", "onnxscript", "diffusers")),
}
ORACLE = "diffusers"
