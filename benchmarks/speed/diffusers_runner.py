"""diffusers as a runner, eager and compiled; its networks as modules of tensors, which others export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.speed.tasks import Piece, Run, Task, inputs

if TYPE_CHECKING:
    import torch


def load(task: Task, *, channels_last: bool = True, compiled: str | None = None, exact: bool = False) -> Run:
    """The run of a task by diffusers' networks, `compiled` in a mode of torch.compile.

    `exact` computes in float32 whatever the task says, as the oracle.
    """
    import torch

    from benchmarks.speed.sampling_loop import run_of, torch_arrays

    torch.set_num_threads(task.threads)
    if exact:
        torch.backends.cudnn.allow_tf32 = False
    modules = {piece.kind: module(task, piece, exact=exact).to(task.device) for piece in task.pieces}
    if channels_last:
        modules = {kind: each.to(memory_format=torch.channels_last) for kind, each in modules.items()}
    networks = {kind: _compiled(each, compiled) if compiled else each for kind, each in modules.items()}
    return torch.inference_mode()(run_of(task, networks, torch_arrays(task.device)))


def _compiled(network: torch.nn.Module, mode: str) -> Any:
    """Compiled in "default", on a CPU with the weights packed for good, or in a mode that records CUDA graphs."""
    import torch
    import torch._inductor.config

    if mode == "default":
        torch._inductor.config.freezing = True
        return torch.compile(network)
    fast = torch.compile(network, mode=mode)
    return lambda *given: fast(*given).clone()  # the graph's own memory is written again by its next call


def module(task: Task, piece: Piece, *, exact: bool = False) -> torch.nn.Module:
    """A module that takes and returns float32 tensors and computes in the task's number format."""
    import torch

    dtype = torch.float32 if exact else getattr(torch, task.dtype)
    network = _network(task, piece.kind, dtype)

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.eval()

        def forward(self, x: Any, t: Any = None, context: Any = None, pooled: Any = None, sizes: Any = None) -> Any:
            if piece.kind == "text":
                return self.network(x, return_dict=False)[0].float()
            x = x.to(dtype)
            if piece.kind == "decode":
                return self.network.decode(x, return_dict=False)[0].float()
            if piece.kind == "encode":
                return self.network.encode(x, return_dict=False)[0].mean.float()
            added = None if pooled is None else {"text_embeds": pooled.to(dtype), "time_ids": sizes}
            return self.network(x, t, context.to(dtype), added_cond_kwargs=added, return_dict=False)[0].float()

    return Part().requires_grad_(False)


def _network(task: Task, kind: str, dtype: torch.dtype) -> Any:
    import diffusers

    if kind == "text":
        import transformers

        transformers.utils.logging.disable_progress_bar()
    if task.made:
        return _filled(task, kind).to(dtype)
    if kind == "text":
        return transformers.CLIPTextModel.from_pretrained(task.folder / "text_encoder", dtype=dtype)
    if kind == "unet":
        return diffusers.UNet2DConditionModel.from_pretrained(task.folder, subfolder="unet", torch_dtype=dtype)
    if kind == "decode" and task.decoder:
        return diffusers.AutoencoderTiny.from_pretrained(task.decoder, torch_dtype=dtype)
    return diffusers.AutoencoderKL.from_pretrained(task.folder, subfolder="vae", torch_dtype=dtype)


def _filled(task: Task, kind: str) -> Any:
    """A network built on the task's device from the configuration that fewstep would save, with the same weights."""
    import diffusers
    import torch

    from benchmarks.speed.models import random_loaded_of

    diffusers.utils.logging.set_verbosity_error()
    model = random_loaded_of(task)
    source: Any
    network: Any
    with torch.device(task.device):
        if kind == "text":
            import transformers

            (source,) = model.networks.text_encoders
            network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**source.config.to_transformers()))
        elif kind == "unet":
            source, size = model.networks.unet, task.size // model.spec.autoencoder.factor
            network = diffusers.UNet2DConditionModel.from_config(source.config.to_diffusers(size))
        elif kind == "decode" and model.networks.tiny is not None:
            source, network = model.networks.tiny, diffusers.AutoencoderTiny()
        else:
            source = model.networks.autoencoder
            network = diffusers.AutoencoderKL.from_config(source.config.to_diffusers(task.size))
    weights, prefix = source.state_dict(), "text_model."
    if kind == "text" and not any(name.startswith(prefix) for name in network.state_dict()):
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}  # transformers 5 has none
    network.load_state_dict(weights, strict=True)
    return network


def example(task: Task, piece: Piece) -> tuple[Any, ...]:
    """The inputs of a network as tensors, to trace it with."""
    import torch

    return tuple(torch.from_numpy(value) for value in inputs(task, piece))
