"""Speed of fewstep and its peers on the same random weights, by turns, each in a process of its own.

    python -m benchmarks.speed --model sd-turbo --size 512 --steps 1 --device cpu --peers all
    python -m benchmarks.speed --model sd-turbo --part decode --peers "fewstep+diffusers+openvino"
    python -m benchmarks.speed --model sd-turbo --part decode --waterfall
    python -m benchmarks.speed --suite cpu --resume
    python -m benchmarks.speed --suite cuda
    python -m benchmarks.speed --suite cuda-peers --peers "fewstep+diffusers+diffusers, max-autotune" --peer-seconds 240

Random weights of the real architecture are made once and kept in `--cache`. In each turn a runner starts in a new
process, loads, runs once without counting, then its share of `--runs`, until all runs are done. Written to
`benchmarks/results/`: medians, spread, ratios to the fastest peer, the time of each stage, FLOP/s beside what this
machine's own products, convolutions and copies reach, the error against diffusers in float32, peak memory, the time
to the first image from the start of the process, versions and the command. A peer that is not installed is listed
with the command that installs it.

`--waterfall` adds fewstep's optimizations one by one; `--without` turns some off. `--suite` measures all rows of a
table.

On a card no folder is needed: weights are made there in a second, and only those who read folders have one written.
The suites "cuda", "cuda-peers" and "cuda-waterfall" measure the rows of a model in one process, beside their targets,
and write one file, anew after each row; a runner that takes over `--peer-seconds` for a row is ended.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import gpu_suite, report, waterfall
from benchmarks.speed.machine import flops, hardware_name, peaks, threads_here
from benchmarks.speed.options import BenchmarkOptions, command_parser, parse_options, task_of
from benchmarks.speed.runners import oracle, select_runners
from benchmarks.speed.suite import SUITES, run_suite, suite_options
from benchmarks.speed.turns import measured
from fewstep.evaluate.environment import source_commit


def measure(options: BenchmarkOptions) -> Path:
    """Measure one row and write its results file."""
    task = task_of(options)
    facts = report.Facts(
        hardware=options.hardware or hardware_name(options.device, options.threads or threads_here()),
        runs=options.runs,
        turns=options.turns,
        flops=flops(task),
        peaks=peaks(task),
        command=options.command(),
        commit=options.commit or source_commit(),
    )
    if options.waterfall:
        results = measured(waterfall.rows(options.without, options.device), task, options.runs, options.turns)
        text = report.waterfall(results, waterfall.descriptions(options.device), task, facts)
    else:
        runners = select_runners(options.peers, task, options.without)
        absent = {each.name: install for each in runners if (install := each.missing())}
        results = measured([each for each in runners if each.name not in absent], task, options.runs, options.turns)
        text = report.comparison(results, absent, task, facts, oracle(options.device))
    path = options.place()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text, flush=True)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurements and write their results files."""
    parsed = command_parser(waterfall.names, (*SUITES, *gpu_suite.NAMES), __doc__).parse_args(arguments)
    if parsed.suite in gpu_suite.NAMES and parsed.device == "cpu":
        parsed.device = "cuda"
    options = parse_options(parsed)
    known = waterfall.names(options.device)
    if strange := set(options.without) - set(known):
        raise SystemExit(
            f"error: --without {', '.join(strange)}: no optimization of the engine for {options.device}; "
            f"there are {', '.join(known)}"
        )
    if parsed.suite is None:
        print(measure(options))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what it has started ends too
    if parsed.suite in gpu_suite.NAMES:
        raise SystemExit(min(gpu_suite.run_card_suite(parsed.suite, options), 1))
    rows = suite_options(parsed.suite, options)
    raise SystemExit(min(run_suite(rows, measure, resume=parsed.resume, keep=parsed.keep_exports), 1))


if __name__ == "__main__":
    main()
