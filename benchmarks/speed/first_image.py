"""Generates one image and exits: `python -m benchmarks.speed.first_image sd-turbo cuda float16 512`.

Prints {"drawn": when the image was finished, by the system's monotonic clock, "made": seconds of making weights}.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter


def main(model: str, device: str, dtype: str, size: int) -> None:
    """Import, make the model, generate an image, and print the times."""
    import torch

    from benchmarks.speed.models import random_loaded
    from benchmarks.speed.tasks import prompt
    from fewstep import Pipeline

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    torch.zeros(1, device=device)  # what a card's first use costs counts
    wait()
    started = perf_counter()
    loaded = random_loaded(model, device, getattr(torch, dtype))
    wait()
    made = perf_counter() - started
    Pipeline.of(loaded).text_to_image(prompt(0), seed=0, width=size, height=size)
    print(json.dumps({"drawn": perf_counter(), "made": made}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
