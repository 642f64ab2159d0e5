"""fewstep as a runner: one network by an engine, or text to image by its pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.speed.tasks import Run, RunOutput, Task, noise, prompt

if TYPE_CHECKING:
    from fewstep.engines.engine import Engine
    from fewstep.pipeline.pipeline import Pipeline
    from fewstep.weights.model import LoadedModel

HUGE_PAGES, SMALL_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}, {"THP_MEM_ALLOC_ENABLE": "0"}
"""PyTorch's allocator asks for huge pages, or not, as its process's first environment says."""


def load(task: Task, *, plain: bool = False, optimizations: Mapping[str, bool] | None = None, **options: Any) -> Run:
    """The run of a task by the engine for its device with `optimizations`, or by the plain engine."""
    import torch

    from benchmarks.speed.sampling_loop import run_of, torch_arrays

    torch.set_num_threads(task.threads)
    model, arrays = _model(task), torch_arrays(task.device)
    engine = _engine(model, plain=plain, optimizations=optimizations, **options)
    if task.part != "whole":
        return torch.inference_mode()(run_of(task, _networks(engine, task.scaling), arrays))
    from fewstep.pipeline.pipeline import Pipeline

    pipe = Pipeline(model.spec, model.tokenizers, engine)
    return _images(pipe, task) if task.images else torch.inference_mode()(_whole(pipe, task, arrays.wait))


def _model(task: Task) -> LoadedModel:
    import torch

    if task.made:
        from benchmarks.speed.models import random_loaded_of

        return random_loaded_of(task)
    from fewstep.weights.load import load_model, load_tiny

    where: dict[str, Any] = {"dtype": getattr(torch, task.dtype), "device": torch.device(task.device)}
    model = load_model(task.folder, **where)
    return model if task.decoder is None else model.with_tiny(load_tiny(task.decoder, **where))


def _engine(model: LoadedModel, *, plain: bool, optimizations: Mapping[str, bool] | None, **options: Any) -> Engine:
    from fewstep.engines.cpu.engine import CpuEngine
    from fewstep.engines.cpu.optimizations import Optimizations
    from fewstep.engines.cuda.engine import CudaEngine
    from fewstep.engines.cuda.optimizations import CudaOptimizations
    from fewstep.engines.eager import EagerEngine

    if plain:
        return EagerEngine(model.spec, model.networks)
    if model.networks.unet.conv_in.weight.is_cuda:
        return CudaEngine(model.spec, model.networks, optimizations=CudaOptimizations(**optimizations or {}), **options)
    return CpuEngine(model.spec, model.networks, optimizations=Optimizations(**optimizations or {}), **options)


def _networks(engine: Engine, scaling: float) -> dict[str, Any]:
    from fewstep.engines.engine import Conditioning

    def predict(x: Any, t: Any, context: Any, pooled: Any = None, sizes: Any = None) -> Any:
        return engine.predict(x, t[:1].expand(len(x)), Conditioning(context=context, pooled=pooled, sizes=sizes))

    return {
        "unet": predict,
        "decode": lambda latents: engine.decode(latents * scaling),
        "encode": lambda image: engine.encode(image)[0] / scaling,
    }


def _whole(pipe: Pipeline, task: Task, wait: Any) -> Run:
    import torch

    options: dict[str, Any] = {
        "steps": task.steps,
        "guidance_scale": task.guidance,
        "sampler": task.sampler,
        "schedule": task.schedule,
        "width": task.size,
        "height": task.size,
        "images_per_prompt": task.batch,
        "latents": torch.from_numpy(noise(task)),
        "output": "latent",
    }
    numbers = count()

    def run() -> RunOutput:
        result = pipe.text_to_image(prompt(next(numbers)), **options)
        started = perf_counter()
        assert result.latents is not None
        image = pipe.engine.decode(result.latents)
        wait()
        seconds = result.seconds
        stages = {"text": seconds["text"], "unet": seconds["denoise"], "decode": perf_counter() - started}
        return RunOutput(image, stages)

    return run


def _images(pipe: Pipeline, task: Task) -> Run:
    """From a prompt to PIL images; batches as in `fewstep batch`, the next begun before one ends."""
    options: dict[str, Any] = {"steps": task.steps, "guidance_scale": task.guidance, "sampler": task.sampler}
    options |= {"width": task.size, "height": task.size, "images_per_prompt": task.batch}
    numbers, under_way, most = count(), deque[Any](), 1 if task.batch > 1 else 0

    def run() -> RunOutput:
        while len(under_way) <= most:
            number = next(numbers)
            under_way.append(pipe.start(prompt(number), seed=number, **options).launch())
        result = under_way.popleft().result()
        assert [image.size for image in result.images] == [(task.size, task.size)] * task.batch
        return RunOutput(None)

    return run
