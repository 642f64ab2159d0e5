"""stable-diffusion.cpp as a runner: text to image only, from noise of its own."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.speed.tasks import Run, RunOutput, Task, prompt

SAMPLERS = {"euler": "euler", "dpmpp_2m": "dpm++2m"}
STAGES = {"get_learned_condition": "text", "sampling": "unet", "decode_first_stage": "decode"}
_TAKEN = re.compile(r"(\w+) completed, taking ([\d.]+)s")


def prepare(task: Task) -> None:
    """Write the model as an original single file, the layout that it reads."""
    path = _single_file(task)
    if path.exists():
        return
    import torch

    from fewstep.weights.load import load_model
    from fewstep.weights.save import save_single_file

    path.parent.mkdir(exist_ok=True)
    save_single_file(load_model(task.folder, dtype=torch.float32), path)


def load(task: Task, *, weights: str) -> Run:
    """The run of a task with the weights in the format `weights`: "f32", "f16" or "q8_0"."""
    import numpy as np
    import stable_diffusion_cpp

    log_lines: list[str] = []
    callback = _capture_log(log_lines)
    tiny = {} if task.decoder is None else {"taesd_path": str(_tensors(task.decoder))}
    model = stable_diffusion_cpp.StableDiffusion(
        model_path=str(_single_file(task)),
        wtype=weights,
        n_threads=task.threads,
        prediction="eps",
        vae_decode_only=True,
        diffusion_flash_attn=True,
        verbose=False,
        **tiny,
    )
    _check_loaded(model, log_lines)
    numbers = count()

    def run() -> RunOutput:
        log_lines.clear()
        images = model.generate_image(
            prompt(next(numbers)),
            width=task.size,
            height=task.size,
            cfg_scale=max(task.guidance, 1.0),
            sample_method=SAMPLERS[task.sampler],
            sample_steps=task.steps,
            batch_count=task.batch,
            seed=0,
        )
        assert callback is not None
        return RunOutput(np.stack([np.asarray(image) for image in images]), stages(log_lines))

    return run


def _check_loaded(model: Any, log_lines: list[str]) -> None:
    """RuntimeError with its own words where it has not loaded: its package finds out only when it draws."""
    if model._model.model:
        return
    model._model.model = None  # there is nothing to free, and to free it crashes
    why = next((line for line in log_lines if "wrong shape" in line or "failed" in line), "it does not say why")
    raise RuntimeError(f"it does not load a model of this shape: {why.partition(' - ')[2].strip() or why}")


def stages(log_lines: list[str]) -> Mapping[str, float]:
    """The seconds of each stage by what the library says of itself; of a batch it draws one after the other."""
    seconds: dict[str, float] = {}
    for match in filter(None, map(_TAKEN.search, log_lines)):
        if (name := STAGES.get(match[1])) is not None:
            seconds[name] = seconds.get(name, 0.0) + float(match[2])
    return seconds


def _capture_log(log_lines: list[str]) -> Any:
    """Put what the library says into `log_lines`, for as long as the value lives."""
    import stable_diffusion_cpp

    @stable_diffusion_cpp.sd_log_callback
    def append_line(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        log_lines.append(text.decode("utf-8", errors="replace"))

    stable_diffusion_cpp.sd_set_log_callback(append_line, ctypes.c_void_p(0))
    return append_line


def _single_file(task: Task) -> Path:
    return task.folder / "single" / "model.safetensors"


def _tensors(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"
