"""What a finished stage leaves in its folder: that it is done, how long it took, and with which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import InputError, quoted
from fewstep.files import write_json
from fewstep.train.checkpoint import checkpoints
from fewstep.train.plan import Plan

DONE = "done"
"""The file's name."""
LENGTH = ("plan.steps", "plan.seconds")
FREE = {
    f"plan.{name}"
    for name in ("folder", "save_seconds", "log_steps", "sample_steps", "keep", "tensorboard", "compiled", "replayed")
} | {"plan.checkpointing", "task.device", "task.sample_prompts"}
"""Settings that do not change what comes of a stage."""
SHOWN = 4


def write_done(plan: Plan, settings: Mapping[str, str], *, steps: int, seconds: float) -> None:
    """Note that a stage is done, after so many steps and seconds of training in all."""
    noted = {name: _placed(value, plan.folder) for name, value in settings.items() if name not in FREE}
    noted = {name: value for name, value in noted.items() if " at 0x" not in value}  # that differs from run to run
    write_json(plan.folder / DONE, {"steps": steps, "seconds": seconds, "settings": noted})


def is_done(plan: Plan, settings: Mapping[str, str]) -> bool:
    """Whether a stage is at its end: False where it was never there, or where the plan is longer now.

    Raises `InputError` where it was done with other settings, or for longer.
    """
    path = plan.folder / DONE
    if not path.is_file():
        return False
    noted = _read(path)
    if noted is None:  # the newest checkpoint tells how long it was
        steps = max((int(one.stem.removeprefix("step-")) for one in checkpoints(plan.folder)), default=None)
        return steps is None or plan.seconds is not None or plan.progress(steps, 0.0) >= 1
    before = {name: value for name, value in noted["settings"].items() if name in settings}
    changed = [name for name in before if before[name] != _placed(settings[name], plan.folder)]
    shorter = (plan.steps is not None and noted["steps"] > plan.steps) or (
        plan.seconds is not None and noted["seconds"] > plan.seconds
    )
    if any(name not in LENGTH for name in changed) or (changed and shorter):
        listed = [f"{name} was {quoted(before[name])} and is {quoted(settings[name])}" for name in changed[:SHOWN]]
        raise InputError(
            f"stage {plan.folder.name} was done before in {plan.folder}, with other settings: {'; '.join(listed)}. "
            "Keep its settings (STAGE.key=value is for one stage), give another folder with --out, or delete this one "
            "to train it anew"
        )
    return not changed or plan.progress(noted["steps"], noted["seconds"]) >= 1


def _read(path: Path) -> dict[str, Any] | None:
    """What was noted; None of a file without a note, which is older."""
    try:
        noted = json.loads(path.read_bytes())
        return {"steps": int(noted["steps"]), "seconds": float(noted["seconds"]), "settings": dict(noted["settings"])}
    except (ValueError, TypeError, KeyError):
        return None


def _placed(value: str, folder: Path) -> str:
    """A setting that is a path below the run's folder as seen from there: the whole may have been moved."""
    out = folder.parent
    return f"OUT/{Path(value).relative_to(out)}" if Path(value).is_relative_to(out) and str(out) != "." else value
