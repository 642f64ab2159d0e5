"""Start-up: seconds of importing fewstep and of the first image, and the memory of loading.

    python -m benchmarks.startup --hardware NAME [--runs 7]

Writes `results/startup_<hardware>_<date>.md`: medians of whole processes, run in turns, also as ratios to a bare
`import torch`, which tells more than seconds do on a machine that has other work; what is imported on the way to
a picture; the embedded model's next pictures; and the peak memory of loading a checkpoint of random weights of about
a gigabyte.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import fewstep
from benchmarks.commit import add_commit_option, commit_line
from fewstep.evaluate.environment import processor

RESULTS = Path(__file__).parent / "results"
PROMPT = "a red cube on top of a blue sphere"
YARDSTICK = "import torch"
PACKAGES = ("torch", "numpy", "safetensors", "pillow", "tokenizers", "typer", "rich")
LISTED_PACKAGES = 12  # packages in the table of imports


def command_lines(folder: Path) -> dict[str, list[str]]:
    """What is timed: a name, and the arguments of a fresh interpreter."""
    picture = ["-m", "fewstep", "generate", PROMPT, "--seed", "7", "--quiet", "-o", str(folder / "cube.png")]
    return {
        "python -c pass": ["-c", "pass"],
        YARDSTICK: ["-c", "import torch"],
        "import fewstep": ["-c", "import fewstep"],
        "fewstep --help": ["-m", "fewstep", "--help"],
        f'fewstep generate "{PROMPT}"': picture,
    }


def run(arguments: Sequence[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds from start to end of an interpreter that must succeed, and what it said."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return seconds, done


def timings(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[float]]:
    """Seconds of every command, `runs` times in turns, after one turn that warms the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, arguments in commands.items():
            taken, _ = run(arguments)
            if turn:
                seconds[name].append(taken)
    return seconds


def warm(runs: int) -> list[dict[str, Any]]:
    """What `fewstep bench` finds for pictures of the embedded model after the first one."""
    options = [["--steps", steps, "--threads", threads] for steps in ("1", "4") for threads in ("1", "2")]
    return [
        json.loads(run(["-m", "fewstep", "bench", "--json", "--runs", str(runs), *each])[1].stdout) for each in options
    ]


def import_times(arguments: Sequence[str]) -> Counter[str]:
    """Microseconds that each package's own modules took to import, by `-X importtime`."""
    _, done = run(["-X", "importtime", *arguments])
    microseconds: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", done.stderr, re.MULTILINE):
        microseconds[name.split(".")[0]] += int(own)
    return microseconds


def write_checkpoint(folder: Path) -> int:
    """A diffusers folder with a UNet of random weights, the rest being the embedded model's; its bytes of weights."""
    from fewstep.models.config import Stage, UNetConfig
    from fewstep.models.unet import UNet

    pipe = fewstep.load(device="cpu")
    stages = tuple(Stage(channels=c, depth=1, heads=8) for c in (256, 512, 768))
    from fewstep.weights.model import LoadedModel

    unet = UNet(UNetConfig(stages=stages, context=pipe.spec.unet.context))
    model = LoadedModel(pipe.spec, pipe.tokenizers, pipe.networks)
    fewstep.Pipeline.of(model.with_unet(unet)).save(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


LOADING = """
import json, sys, time
import fewstep

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

fewstep.load(device="cpu").text_to_image("a red cube", steps=1)  # all that is imported later, and the allocator's own
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
start = time.perf_counter()
pipe = fewstep.load(sys.argv[1], device="cpu", dtype="float32")
seconds = time.perf_counter() - start
parts = (pipe.networks.unet, pipe.networks.autoencoder, *pipe.networks.text_encoders)
total = sum(float(weight.sum()) for part in parts for weight in part.state_dict().values())  # reads every page
print(json.dumps({"seconds": seconds, "growth": memory("VmHWM") - before}))
"""


def loading(runs: int) -> dict[str, float] | None:
    """Medians of loading: bytes of weights, peak growth of memory in bytes, seconds; None where Linux is not."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with tempfile.TemporaryDirectory() as room:
        size = write_checkpoint(Path(room) / "model")
        runs_of_loading = [json.loads(run(["-c", LOADING, str(Path(room) / "model")])[1].stdout) for _ in range(runs)]
    return {
        "size": size,
        "growth": median(each["growth"] for each in runs_of_loading),
        "seconds": median(each["seconds"] for each in runs_of_loading),
    }


def report(
    seconds: Mapping[str, Sequence[float]],
    spent: Counter[str],
    pictures: Sequence[Mapping[str, Any]],
    load: dict[str, float] | None,
    commit: str,
) -> str:
    """The page of results, in markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bare = median(seconds[YARDSTICK])
    versions = [f"fewstep {fewstep.__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]
    lines = [
        "# Start-up and loading",
        "",
        f"- command: `python -m benchmarks.startup {' '.join(sys.argv[1:])}`",
        f"- machine: {processor()}, {cores} cores, {platform.system()}, Python {platform.python_version()}",
        f"- versions: {', '.join(versions)}",
        f"- {commit_line(commit)}",
        f"- threads: OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "",
        "| process | median s | fastest | slowest | by `import torch` |",
        "|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        figures = f"{median(taken):.2f} | {min(taken):.2f} | {max(taken):.2f} | {median(taken) / bare:.2f}"
        lines.append(f"| `{name}` | {figures} |")
    oracles = sorted({"diffusers", "transformers"} & set(spent)) or "neither diffusers nor transformers"
    lines += ["", f"On the way to the picture {oracles} are imported. Where the time of importing goes:", ""]
    lines += ["| package | own modules, s |", "|---|---|"]
    lines += [f"| {name} | {taken / 1e6:.3f} |" for name, taken in spent.most_common(LISTED_PACKAGES)]
    size = f"{pictures[0]['width']}x{pictures[0]['height']}"
    lines += ["", f"The next pictures of {pictures[0]['model']} at {size}, {pictures[0]['runs']} each:", ""]
    lines += ["| steps | threads | median ms | fastest | slowest |", "|---|---|---|---|---|"]
    for each in pictures:
        figures = (f"{1e3 * each[f'{name}_seconds']:.1f}" for name in ("picture", "fastest", "slowest"))
        lines.append(f"| {each['steps']} | {each['threads']} | {' | '.join(figures)} |")
    if load:
        ratio = load["growth"] / load["size"]
        lines += ["", f"Loading {load['size'] / 1e6:,.0f} MB of float32 weights and reading each of them once: "]
        lines[-1] += f"memory grows by {load['growth'] / 1e6:,.0f} MB at its peak, {ratio:.3f} of the files; "
        lines[-1] += f"`fewstep.load` takes {load['seconds']:.2f} s."
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="a short name for the file, as 2-core-epyc")
    parser.add_argument("--runs", type=int, default=7)
    add_commit_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        commands = command_lines(Path(room))
        seconds = timings(commands, options.runs)
        spent = import_times(list(commands.values())[-1])
    page = report(seconds, spent, warm(5 * options.runs), loading(min(options.runs, 3)), options.commit)
    place = RESULTS / f"startup_{options.hardware}_{datetime.date.today():%Y-%m-%d}.md"
    RESULTS.mkdir(exist_ok=True)
    place.write_text(page, encoding="utf-8")
    print(f"{page}\nwritten to {place}")


if __name__ == "__main__":
    main()
