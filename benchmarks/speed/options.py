"""The options of `python -m benchmarks.speed`, and the task that they define."""

from __future__ import annotations

import argparse
import datetime
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.commit import COMMIT_HELP
from benchmarks.speed.machine import hardware_name, threads_here
from benchmarks.speed.sampling_loop import SAMPLERS
from benchmarks.speed.tasks import PARTS, Task

RESULTS = Path(__file__).parent.parent / "results"
_NOT_IN_COMMAND = ("cache", "results", "commit")  # they change no number


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """The options of `python -m benchmarks.speed`; None stands for the default of the model or the machine."""

    model: str = "sd-turbo"
    part: str = "whole"
    size: int = 512
    batch: int = 1
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    decoder: str = "kl"
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    peers: str = "all"
    without: tuple[str, ...] = ()
    waterfall: bool = False
    runs: int = 5
    turns: int = 2
    hardware: str | None = None
    peer_seconds: float = 240.0
    cache: Path = Path("cache")
    results: Path = RESULTS
    commit: str = ""

    @property
    def name(self) -> str:
        """The row's name in a suite and in its file name."""
        given = [f"s{self.steps}"] if self.steps and self.part == "whole" else []
        given += ["tiny"] if self.decoder == "tiny" else []
        given += ["without", *self.without] if self.without else []
        given += [self.dtype] if self.dtype else []
        kind = "waterfall" if self.waterfall else "speed"
        return "_".join([kind, self.model, self.part, str(self.size), f"b{self.batch}", *given])

    def place(self) -> Path:
        """The results file."""
        hardware = self.hardware or hardware_name(self.device, self.threads or threads_here())
        return self.results / f"{self.name}_{hardware}_{datetime.date.today()}.md"

    def command(self, suite: str | None = None) -> str:
        """The command that asks for the same, of a row or a suite: all that is not left to its default."""
        words = ["python", "-m", "benchmarks.speed", *(["--suite", suite] if suite else [])]
        always = () if suite else ("model", "part", "size")
        for each in fields(self):
            value, flag = getattr(self, each.name), f"--{each.name.replace('_', '-')}"
            if each.name in _NOT_IN_COMMAND or (value == each.default and each.name not in always):
                continue
            if each.name == "without":
                words += [word for name in value for word in (flag, name)]
            else:
                words += [flag] if value is True else [flag, str(value)]
        return shlex.join(words)


def command_parser(
    optimizations: Callable[[str], Sequence[str]], suites: Sequence[str], about: str | None
) -> argparse.ArgumentParser:
    """The command line; `optimizations` are what `--without` knows on a device, `suites` what `--suite` does."""
    defaults = BenchmarkOptions()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, text: str, **options: Any) -> None:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=getattr(defaults, name), help=text, **options)

    option("model", "a name of fewstep's catalogue, as sd-turbo, sd-v1-4, small-sd, sdxl-base")
    option("part", "the whole from prompt to image, or one network", choices=PARTS)
    option("size", "of the image in pixels", type=int)
    option("batch", "images at a time", type=int)
    option("steps", "else 1 for turbo models and 10 for others", type=int)
    option("guidance", "else the model's own", type=float)
    option("sampler", "else euler, or dpmpp_2m with guidance", choices=SAMPLERS)
    option("decoder", "the autoencoder's own, or a tiny one", choices=("kl", "tiny"))
    option("device", "cpu, cuda, cuda:1")
    option("dtype", "else float32 on a CPU and float16 on CUDA", choices=("float32", "float16", "bfloat16"))
    option("threads", "else all processors", type=int)
    option("peers", "names with a + between them, or all; else all, and of the suite cuda fewstep alone")
    option("peer_seconds", "of a suite for cards: for one row of one runner, which is ended after", type=float)
    option("waterfall", "fewstep with one optimization after the other, instead of the peers", action="store_true")
    option("runs", "that count, for each runner", type=int)
    option("turns", "in how many processes one after the other, by turns with the others", type=int)
    option("hardware", "a short name for the file, else the processor's or the card's")
    option("cache", "where random models lie", type=Path)
    option("results", "where the results go", type=Path)
    option("commit", COMMIT_HELP)
    parser.set_defaults(peers=None)
    known = sorted({*optimizations("cpu"), *optimizations("cuda")})
    parser.add_argument("--without", action="append", default=[], choices=known, help="turn off an optimization")
    parser.add_argument("--suite", choices=suites, help="all rows of the table, one after the other")
    parser.add_argument("--resume", action="store_true", help="of a suite: leave out rows that have a file of today")
    parser.add_argument("--keep-exports", action="store_true", help="of a suite: keep what peers had converted")
    return parser


def parse_options(arguments: argparse.Namespace) -> BenchmarkOptions:
    """The options of a parsed command line. Exits where the device is not there or cannot do it."""
    runners_named = {each.name: getattr(arguments, each.name) for each in fields(BenchmarkOptions)}
    peers = arguments.peers or ("fewstep" if arguments.suite == "cuda" else "all")
    options = BenchmarkOptions(**{**runners_named, "without": tuple(arguments.without), "peers": peers})
    if options.device != "cpu":
        _check_cuda(options.device)
    elif options.dtype not in (None, "float32"):
        raise SystemExit(f"error: --dtype {options.dtype}: all runners compute in float32 on a CPU; leave it out")
    if options.runs < 1 or options.turns < 1:
        raise SystemExit("error: --runs and --turns are at least 1")
    return options


def _check_cuda(device: str) -> None:
    import torch

    if not device.startswith("cuda"):
        raise SystemExit(f"error: --device {device}: runners run on cpu and on cuda")
    if not torch.cuda.is_available():
        raise SystemExit(
            f"error: --device {device}: PyTorch {torch.__version__} finds no CUDA device here; run this on a machine "
            "with an NVIDIA card and a PyTorch built for CUDA, or use --device cpu"
        )


def task_of(options: BenchmarkOptions) -> Task:
    """The task of `options`; on a graphics card runners that read no folder make its weights there."""
    from benchmarks.speed.models import noise_levels_of, random_model
    from fewstep.models.zoo import entry

    known = entry(options.model)
    if known.unet is None or known.defaults is None:
        raise SystemExit(f"error: --model {options.model} has no shapes in the catalogue; name one such as sd-turbo")
    guidance = known.defaults.guidance_scale if options.guidance is None else options.guidance
    sampler = options.sampler or ("dpmpp_2m" if guidance > 1 else "euler")
    steps = options.steps or min(known.defaults.steps, 10)
    made, dtype = options.device != "cpu", options.dtype or ("float32" if options.device == "cpu" else "float16")
    kind = f"-{dtype}-cuda" if made else ""
    task = Task(
        model=options.model,
        folder=options.cache / f"random-{options.model}{kind}",
        part=options.part,
        size=options.size,
        batch=options.batch,
        threads=options.threads or threads_here(),
        device=options.device,
        dtype=dtype,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        schedule=known.defaults.schedule or "leading",
        levels=noise_levels_of(options.model, steps, sampler),
        decoder=options.cache / f"random-taesd{kind}" if options.decoder == "tiny" else None,
        made=made,
    )
    if not made:
        random_model(task)
    return task
