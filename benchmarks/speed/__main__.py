"""Speed beside the peers: every contender on the same random weights, by turns, in processes of their own.

    python -m benchmarks.speed --model sd-turbo --size 512 --steps 1 --device cpu --peers all
    python -m benchmarks.speed --model sd-turbo --part decode --peers "fewstep+diffusers+openvino"
    python -m benchmarks.speed --model sd-turbo --part decode --waterfall
    python -m benchmarks.speed --suite cpu --resume
    python -m benchmarks.speed --suite cuda
    python -m benchmarks.speed --suite cuda-peers --peers "fewstep+diffusers+diffusers, max-autotune" --peer-seconds 240

Random weights of the real architecture are made once and kept in `--cache`. In each turn a contender starts anew,
loads, runs once without counting, then its share of `--runs`; turns go round until all runs are done. Written to
`benchmarks/results/`: medians, spread, ratios to the fastest peer, the time of each stage, FLOP/s beside what this
machine's own products, convolutions and copies reach, the error against diffusers in float32, peak memory, the time
to the first picture from the start of the process, versions and the command. A peer that is not installed is listed
with the command that installs it.

`--waterfall` adds fewstep's optimizations one by one; `--without` turns some off. `--suite` measures all rows of a
table.

On a card no folder is needed: weights are made there in a second, and only those who read folders have one written.
The suites "cuda", "cuda-peers" and "cuda-waterfall" measure the rows of a model in one process, beside their targets,
and write one file, anew after each row; a contender that takes over `--peer-seconds` for a row is ended.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import card, report, waterfall
from benchmarks.speed.contenders import chosen, oracle
from benchmarks.speed.machine import flops, hardware_name, peaks, threads_here
from benchmarks.speed.request import Request, parser, request_of, task_of
from benchmarks.speed.suite import SUITES, requests, run_suite
from benchmarks.speed.turns import measured


def measure(request: Request) -> Path:
    """Measure one row and write its results file."""
    task = task_of(request)
    facts = report.Facts(
        hardware=request.hardware or hardware_name(request.device, request.threads or threads_here()),
        runs=request.runs,
        turns=request.turns,
        flops=flops(task),
        peaks=peaks(task),
        command=request.command(),
    )
    if request.waterfall:
        found = measured(waterfall.rows(request.without, request.device), task, request.runs, request.turns)
        text = report.waterfall(found, waterfall.descriptions(request.device), task, facts)
    else:
        wanted = chosen(request.peers, task, request.without)
        absent = {each.name: install for each in wanted if (install := each.missing())}
        found = measured([each for each in wanted if each.name not in absent], task, request.runs, request.turns)
        text = report.comparison(found, absent, task, facts, oracle(request.device))
    path = request.place()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text, flush=True)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and keep the results."""
    asked = parser(waterfall.names, (*SUITES, *card.NAMES), __doc__).parse_args(arguments)
    if asked.suite in card.NAMES and asked.device == "cpu":
        asked.device = "cuda"
    request = request_of(asked)
    known = waterfall.names(request.device)
    if strange := set(request.without) - set(known):
        raise SystemExit(
            f"error: --without {', '.join(strange)}: no optimization of the engine for {request.device}; "
            f"there are {', '.join(known)}"
        )
    if asked.suite is None:
        print(measure(request))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what it has started ends too
    if asked.suite in card.NAMES:
        raise SystemExit(min(card.run_card_suite(asked.suite, request, asked.commit), 1))
    rows = requests(asked.suite, request)
    raise SystemExit(min(run_suite(rows, measure, resume=asked.resume, keep=asked.keep_exports), 1))


if __name__ == "__main__":
    main()
