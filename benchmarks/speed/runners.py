"""The runners: fewstep and its peers, on a CPU and on CUDA, each with its best settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.speed import diffusers_runner, exported_runners, fewstep_runner, sdcpp_runner
from benchmarks.speed.fewstep_runner import HUGE_PAGES, SMALL_PAGES
from benchmarks.speed.tasks import Run, Task
from fewstep.models.zoo import entry

SWITCHES = ("huge_pages",)
"""What `--without` can turn off besides the optimizations of fewstep's engine."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """An implementation to be measured: how it loads a task, its environment variables, and its packages.

    `prepare` writes the files that it reads, in a process that is not measured. `whole`: it runs text to image only.
    `comparable`: it starts from the same noise as the others.
    """

    name: str
    load: Callable[..., Run]
    packages: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=SMALL_PAGES.copy)
    prepare: Callable[[Task], None] | None = None
    peer: bool = True
    whole: bool = False
    comparable: bool = True

    def versions(self) -> str:
        """`openvino 2026.4.1`: its packages, which must be installed."""
        return ", ".join(f"{name} {version_of(name)}" for name in self.packages)

    def missing(self) -> str | None:
        """What to install, where something is not."""
        for name in self.packages:
            try:
                version_of(name)
            except PackageNotFoundError:
                return f"pip install {' '.join(self.packages)}"
        return None


def version_of(package: str) -> str:
    """The version of an installed package, or of fewstep wherever it is imported from. Raises PackageNotFoundError."""
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "fewstep":
            raise
        from fewstep.version import __version__

        return __version__


FEWSTEP = Runner(
    name="fewstep", load=fewstep_runner.load, packages=("fewstep", "torch"), environment=HUGE_PAGES, peer=False
)
_FEWSTEP: dict[str, Any] = {"load": fewstep_runner.load, "packages": ("fewstep", "torch"), "peer": False}
_DIFFUSERS: dict[str, Any] = {"load": diffusers_runner.load, "packages": ("diffusers", "transformers", "torch")}
_SD_CPP: dict[str, Any] = {
    "load": sdcpp_runner.load,
    "packages": ("stable-diffusion-cpp-python",),
    "prepare": sdcpp_runner.prepare,
    "whole": True,
    "comparable": False,
}

FEWSTEP = Runner(name="fewstep", environment=HUGE_PAGES, **_FEWSTEP)
CPU = (
    FEWSTEP,
    Runner(
        name="fewstep, plain engine",
        load=fewstep_runner.load,
        packages=("fewstep", "torch"),
        options={"plain": True},
        peer=False,
    ),
    Runner(name="fewstep, strict", options={"strict": True}, environment=HUGE_PAGES, **_FEWSTEP),
    Runner(name="diffusers", options={"channels_last": False}, **_DIFFUSERS),
    Runner(name="diffusers, channels last, huge pages", environment=HUGE_PAGES, **_DIFFUSERS),
    Runner(name="diffusers, torch.compile", environment=HUGE_PAGES, options={"compiled": "default"}, **_DIFFUSERS),
    Runner(
        name="openvino",
        load=exported_runners.load_openvino,
        packages=("openvino", "diffusers"),
        prepare=exported_runners.prepare_openvino,
    ),
    Runner(
        name="onnxruntime",
        load=exported_runners.load_onnxruntime,
        packages=("onnxruntime", "onnxscript", "diffusers"),
        prepare=exported_runners.prepare_onnx,
    ),
    *(
        Runner(name=f"stable-diffusion.cpp, {weights}", options={"weights": weights}, **_SD_CPP)
        for weights in ("f32", "f16", "q8_0")
    ),
)
CUDA = (
    Runner(name="fewstep", **_FEWSTEP),
    Runner(name="fewstep, plain engine", options={"plain": True}, **_FEWSTEP),
    Runner(name="diffusers", **_DIFFUSERS),
    Runner(name="diffusers, float32", options={"channels_last": False, "exact": True}, **_DIFFUSERS),
    *(
        Runner(name=f"diffusers, {mode}", options={"compiled": mode}, **_DIFFUSERS)
        for mode in ("reduce-overhead", "max-autotune")
    ),
    Runner(
        name="onnxruntime",
        load=exported_runners.load_onnxruntime_cuda,
        packages=("onnxruntime-gpu", "onnxscript", "diffusers"),
        prepare=exported_runners.prepare_onnx,
    ),
    Runner(
        name="tensorrt",
        load=exported_runners.load_tensorrt,
        packages=("tensorrt", "onnxscript", "diffusers"),
        prepare=exported_runners.prepare_tensorrt,
    ),
)


def runners_for(device: str) -> tuple[Runner, ...]:
    """All runners for a device."""
    return CUDA if device.startswith("cuda") else CPU


def oracle(device: str) -> str:
    """The name of the runner that the others are compared with: diffusers in float32."""
    return "diffusers, float32" if device.startswith("cuda") else "diffusers"


def select_runners(peers: str, task: Task, without: Sequence[str] = ()) -> list[Runner]:
    """Those named in `peers` that can do the task; fewstep runs without the optimizations `without`."""
    selected = runners_named(peers, runners_for(task.device))
    able = [each for each in selected if task.part == "whole" or not each.whole]
    if not able:
        raise SystemExit(f"error: --peers {peers}: they draw whole images alone; use --part whole")
    if task.part == "whole" and len(entry(task.model).texts) > 1:
        able = [each for each in able if not each.peer]  # the others are given one text tower here
        if not able:
            raise SystemExit(f"error: --peers {peers}: of two text towers fewstep draws wholes alone; use --part unet")
    return [without_optimizations(each, without) if each.name == "fewstep" else each for each in able]


def runners_named(peers: str, all_here: Sequence[Runner]) -> list[Runner]:
    """Those in `peers`, with a + between, or "all". Exits with the nearest name for one that there is not."""
    here = {each.name: each for each in all_here}
    names = list(here) if peers == "all" else [name.strip() for name in peers.split("+")]
    for name in names:
        if name not in here:
            near = get_close_matches(name, here, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise SystemExit(f"error: --peers: nothing is called {name!r}{hint} There are: {' + '.join(here)}")
    return [here[name] for name in names]


def without_optimizations(runner: Runner, without: Sequence[str]) -> Runner:
    """fewstep's `runner` with the optimizations `without` turned off, or itself where there are none."""
    if not without:
        return runner
    optimizations = {name: False for name in without if name not in SWITCHES}
    return Runner(
        name=f"{runner.name} without {', '.join(without)}",
        load=runner.load,
        packages=runner.packages,
        options={**runner.options, "optimizations": optimizations},
        environment=SMALL_PAGES if "huge_pages" in without else runner.environment,
        peer=False,
    )
