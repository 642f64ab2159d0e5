"""The file that a finished stage leaves in its folder: its steps, its seconds of training and its settings."""

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
PLAN_IGNORED = (
    "folder",
    "save_seconds",
    "log_steps",
    "sample_steps",
    "keep_checkpoints",
    "tensorboard",
    "compile",
    "cuda_graphs",
    "activation_checkpointing",
)
IGNORED = {f"plan.{name}" for name in PLAN_IGNORED} | {"task.device", "task.sample_prompts"}
"""Settings that do not change a stage's result."""
SHOWN = 4


def write_done(plan: Plan, settings: Mapping[str, str], *, steps: int, seconds: float) -> None:
    """Record that a stage is done, after `steps` steps and `seconds` of training in all."""
    stored = {name: _relative(value, plan.folder) for name, value in settings.items() if name not in IGNORED}
    stored = {name: value for name, value in stored.items() if " at 0x" not in value}  # that differs from run to run
    write_json(plan.folder / DONE, {"steps": steps, "seconds": seconds, "settings": stored})


def is_done(plan: Plan, settings: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> bool:
    """Whether a stage is at its end: False where it was never trained, or where the plan is longer now.

    `renamed`: old dotted name -> new one; a record with old names is read as if it had the new ones. Raises
    `InputError` where the stage was done with other settings, or for longer.
    """
    path = plan.folder / DONE
    if not path.is_file():
        return False
    record = _read(path, renamed or {})
    if record is None:  # the newest checkpoint tells how long it was
        steps = max((int(one.stem.removeprefix("step-")) for one in checkpoints(plan.folder)), default=None)
        return steps is None or plan.seconds is not None or plan.progress(steps, 0.0) >= 1
    before = {name: value for name, value in record["settings"].items() if name in settings and name not in IGNORED}
    changed = [name for name in before if before[name] != _relative(settings[name], plan.folder)]
    shorter = (plan.steps is not None and record["steps"] > plan.steps) or (
        plan.seconds is not None and record["seconds"] > plan.seconds
    )
    if any(name not in LENGTH for name in changed) or (changed and shorter):
        _refuse(plan, [f"{name} was {quoted(before[name])} and is {quoted(settings[name])}" for name in changed])
    return not changed or plan.progress(record["steps"], record["seconds"]) >= 1


def _refuse(plan: Plan, changes: list[str]) -> None:
    raise InputError(
        f"stage {plan.folder.name} was done before in {plan.folder}, with other settings: "
        f"{'; '.join(changes[:SHOWN])}. Keep its settings (STAGE.key=value is for one stage), give another folder with "
        "--out, or delete this one to train it anew"
    )


def _read(path: Path, renamed: Mapping[str, str]) -> dict[str, Any] | None:
    """The record, its settings under their new names; None of a file without a record, which is older."""
    try:
        record = json.loads(path.read_bytes())
        settings = {renamed.get(name, name): value for name, value in dict(record["settings"]).items()}
        return {"steps": int(record["steps"]), "seconds": float(record["seconds"]), "settings": settings}
    except (ValueError, TypeError, KeyError):
        return None


def _relative(value: str, folder: Path) -> str:
    """A path below the run's folder as `OUT/...`, so that the whole run may be moved; other values as they are."""
    out = folder.parent
    return f"OUT/{Path(value).relative_to(out)}" if Path(value).is_relative_to(out) and str(out) != "." else value
