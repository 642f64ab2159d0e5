"""Rendered block images per second.

    python -m benchmarks.render --hardware NAME [--size 128] [--processes 2] [--count 512]

Each process renders `count` pictures after its sprites are traced, with one thread; the sum of their rates is told,
by the clock and by processor time: on a machine that has other work the second says what an idle one would do.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import time

from benchmarks.commit import add_commit_option, commit_line


def rates(size: int, count: int) -> tuple[float, float, float]:
    """Seconds of tracing the sprites, then pictures a second by the clock and by processor time, in this process."""
    import torch

    from fewstep.blockworld import render, scenes

    torch.set_num_threads(1)
    sampled = scenes(count, seed=7)
    started = time.process_time()
    render(sampled[:1], size)
    traced = time.process_time() - started
    clock, processor = time.perf_counter(), time.process_time()
    render(sampled, size)
    return traced, count / (time.perf_counter() - clock), count / (time.process_time() - processor)


def main() -> None:
    """Print one row of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--count", type=int, default=512)
    add_commit_option(parser)
    options = parser.parse_args()
    with mp.get_context("spawn").Pool(options.processes) as pool:
        rows = pool.starmap(rates, [(options.size, options.count)] * options.processes, chunksize=1)
    traced = max(row[0] for row in rows)
    clock, processor = (sum(row[i] for row in rows) for i in (1, 2))
    print("| hardware | pixels | processes | pictures/s (clock) | pictures/s (processor time) | sprites, s |")
    print("|---|---|---|---|---|---|")
    rates_text = f"{clock:.0f} | {processor:.0f} | {traced:.1f}"
    print(f"| {options.hardware} | {options.size} | {options.processes} | {rates_text} |")
    print(f"\n{commit_line(options.commit)}")


if __name__ == "__main__":
    main()
