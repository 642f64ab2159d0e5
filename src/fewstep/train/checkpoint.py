"""Checkpoints of a training run: written whole or not at all, the last few kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.errors import CheckpointError
from fewstep.files import atomic_write, sweep_partials

State = dict[str, Any]


def save_checkpoint(folder: Path, step: int, state: State, *, keep: int = 2) -> Path:
    """Write `folder/step-00001234.pt` and delete all but the `keep` newest; the path written.

    The file appears under its name only when all of it is on the disk: a kill leaves the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    sweep_partials(folder, own=path.name)
    with atomic_write(path) as file:
        torch.save(state, file)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(folder: Path) -> State | None:
    """The newest checkpoint in `folder`, on the CPU, or None. Raises `CheckpointError` for a damaged file."""
    paths = checkpoints(folder)
    if not paths:
        return None
    try:
        state: State = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken archive
        raise CheckpointError(
            f"{paths[-1]} cannot be read ({error}); delete it to go on from the checkpoint before"
        ) from error
    return state
