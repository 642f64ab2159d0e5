"""Runners of exported networks (OpenVINO, ONNX Runtime, TensorRT); the export is not measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.tasks import Piece, Run, Task

CUDA_PROVIDER = "CUDAExecutionProvider"


def prepare_openvino(task: Task) -> None:
    """Write each network as OpenVINO files, with fixed shapes and in float32."""
    import openvino
    import torch

    from benchmarks.speed.diffusers_runner import example, module

    task = replace(task, made=False)
    for piece in task.pieces:
        with _written(task.place("openvino", piece)) as folder:
            if folder is None:
                continue
            given = example(task, piece)
            with torch.no_grad():
                model = openvino.convert_model(module(task, piece), example_input=given)
            model.reshape({i: list(value.shape) for i, value in enumerate(given)})
            openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def load_openvino(task: Task) -> Run:
    """The run of a task by OpenVINO on a CPU, for latency, in float32."""
    import openvino

    from benchmarks.speed.sampling_loop import NUMPY, run_of

    settings = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()

    def network(piece: Piece) -> Callable[..., Any]:
        path = task.place("openvino", piece) / "model.xml"
        request = core.compile_model(path, "CPU", settings).create_infer_request()
        return lambda *given: request.infer(list(given), share_inputs=True)[0].copy()

    return run_of(task, {piece.kind: network(piece) for piece in task.pieces}, NUMPY)


def prepare_onnx(task: Task) -> None:
    """Write each network as an ONNX file with fixed shapes, its weights beside it."""
    import torch

    from benchmarks.speed.diffusers_runner import example, module

    task = replace(task, made=False)
    for piece in task.pieces:
        with _written(task.place("onnx", piece)) as folder:
            if folder is not None:
                options: dict[str, Any] = {"dynamo": True, "external_data": True, "optimize": True}
                torch.onnx.export(module(task, piece), example(task, piece), folder / "model.onnx", **options)


def load_onnxruntime(task: Task) -> Run:
    """The run of a task by ONNX Runtime on a CPU."""
    import onnxruntime

    from benchmarks.speed.sampling_loop import NUMPY, run_of

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads

    def network(piece: Piece) -> Callable[..., Any]:
        path = task.place("onnx", piece) / "model.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda *given: session.run(None, dict(zip(names, given, strict=True)))[0]

    return run_of(task, {piece.kind: network(piece) for piece in task.pieces}, NUMPY)


def load_onnxruntime_cuda(task: Task) -> Run:
    """The run of a task by ONNX Runtime on a CUDA device, on PyTorch's tensors without copies."""
    import onnxruntime
    import torch

    from benchmarks.speed.sampling_loop import run_of, torch_arrays

    settings = {"device_id": torch.device(task.device).index or 0, "cudnn_conv_algo_search": "EXHAUSTIVE"}

    def network(piece: Piece) -> Callable[..., Any]:
        path = task.place("onnx", piece) / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=[(CUDA_PROVIDER, settings)])
        if CUDA_PROVIDER not in session.get_providers():
            raise RuntimeError("this ONNX Runtime runs on CPUs alone; pip install onnxruntime-gpu")
        return _bound(session, task, piece)

    networks = {piece.kind: network(piece) for piece in task.pieces}
    return torch.inference_mode()(run_of(task, networks, torch_arrays(task.device)))


def _bound(session: Any, task: Task, piece: Piece) -> Callable[..., Any]:
    """A session as a function of CUDA tensors."""
    import numpy as np
    import torch

    index, (target,) = torch.device(task.device).index or 0, session.get_outputs()
    names = [each.name for each in session.get_inputs()]

    def network(*given: Any) -> Any:
        binding, contiguous = session.io_binding(), [value.contiguous() for value in given]
        output = torch.empty(tuple(target.shape), device=task.device)
        for name, value in zip(names, contiguous, strict=True):
            kind = np.int64 if value.dtype == torch.int64 else np.float32
            binding.bind_input(name, "cuda", index, kind, tuple(value.shape), value.data_ptr())
        binding.bind_output(target.name, "cuda", index, np.float32, tuple(output.shape), output.data_ptr())
        torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        session.run_with_iobinding(binding)
        return output

    return network


def prepare_tensorrt(task: Task) -> None:
    """Write each network as a TensorRT engine, built from its ONNX file."""
    import tensorrt

    prepare_onnx(task)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    for piece in task.pieces:
        with _written(task.place("tensorrt", piece)) as folder:
            if folder is None:
                continue
            builder = tensorrt.Builder(logger)
            network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = tensorrt.OnnxParser(network, logger)
            if not parser.parse_from_file(str(task.place("onnx", piece) / "model.onnx")):
                raise RuntimeError(f"TensorRT reads no {piece.kind}: {parser.get_error(0)}")
            plan = builder.build_serialized_network(network, builder.create_builder_config())
            if plan is None:
                raise RuntimeError(f"TensorRT builds no engine of {piece.kind}")
            (folder / "model.plan").write_bytes(bytes(plan))


def load_tensorrt(task: Task) -> Run:
    """The run of a task by TensorRT on a CUDA device, on PyTorch's tensors without copies."""
    import tensorrt
    import torch

    from benchmarks.speed.sampling_loop import run_of, torch_arrays

    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))

    def network(piece: Piece) -> Callable[..., Any]:
        plan = (task.place("tensorrt", piece) / "model.plan").read_bytes()
        return _executed(runtime.deserialize_cuda_engine(plan), task.device)

    networks = {piece.kind: network(piece) for piece in task.pieces}
    return torch.inference_mode()(run_of(task, networks, torch_arrays(task.device)))


def _executed(engine: Any, device: str) -> Callable[..., Any]:
    """An engine as a function of CUDA tensors."""
    import tensorrt
    import torch

    context, stream = engine.create_execution_context(), torch.cuda.Stream(device)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    (target,) = (name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.OUTPUT)
    names.remove(target)

    def network(*given: Any) -> Any:
        contiguous = [value.contiguous() for value in given]
        output = torch.empty(tuple(engine.get_tensor_shape(target)), device=device)
        for name, value in zip([*names, target], [*contiguous, output], strict=True):
            context.set_tensor_address(name, value.data_ptr())
        stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT did not run")
        stream.synchronize()
        return output

    return network


@contextmanager
def _written(folder: Path) -> Iterator[Path | None]:
    """A new folder that takes the name of `folder` when the block has filled it; None where that is there already."""
    if folder.exists():
        yield None
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)
