"""Settings changed from the command line: typed, and refused with the nearest name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from fewstep.errors import InputError
from fewstep.train.overrides import overridden, parsed
from fewstep.train.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 64
    kind: Literal["plain", "fancy"] = "plain"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    plan: Plan = field(default_factory=lambda: Plan(folder=Path("run"), steps=10))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("1e-4", float, 1e-4),
        ("inf", float, float("inf")),
        ("yes", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("0.9,0.99", tuple[float, float], (0.9, 0.99)),
        ("a red cube, a cone", tuple[str, ...], ("a red cube", "a cone")),
        ("fancy", Literal["plain", "fancy"], "fancy"),
        ("data/x", str | Path, "data/x"),
        ("data/x", Path | None, Path("data/x")),
    ],
)
def test_values_have_the_type_of_their_field(text: str, kind: Any, value: object) -> None:
    found = parsed(text, kind, "key")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("3.5", int), ("many", float), ("perhaps", bool), ("1", tuple[float, float]), ("round", Literal["plain"])],
)
def test_a_value_of_another_type_is_refused(text: str, kind: Any) -> None:
    with pytest.raises(InputError, match="key="):
        parsed(text, kind, "key")


def test_a_setting_is_for_all_stages_or_for_one() -> None:
    runs = {"first": Outer(), "second": Outer()}
    changed = overridden(runs, ["plan.learning_rate=0.5", "second.inner.size=128", "inner.kind=fancy"])
    assert [run.plan.learning_rate for run in changed.values()] == [0.5, 0.5]
    assert [run.inner.size for run in changed.values()] == [64, 128]
    assert changed["first"].inner.kind == "fancy"
    assert runs["second"].inner.size == 64


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("plan.learnin_rate=1", "did you mean 'learning_rate'"),
        ("inner.size.x=1", "has no setting"),
        ("inner.size", "key=value"),
        ("plan.precision=fp8", "one of fp32"),
        ("plan.batch_size=0", r"plan\.batch_size is 0; it must be a whole number from 1 .* 1 would do"),
        ("plan.steps=-3", r"plan\.steps is -3; .* 1 would do"),
        ("plan.learning_rate=nan", r"plan\.learning_rate is nan; it must be a finite number above 0"),
        ("plan.steps=none", "no end; give steps or seconds"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        overridden({"only": Outer()}, [setting])


def test_settings_that_need_each_other_are_changed_together() -> None:
    changed = overridden(
        {"only": Outer()}, ["plan.steps=none", "plan.seconds=60", "plan.batch_size=2", "plan.batch_size=3"]
    )
    assert (changed["only"].plan.steps, changed["only"].plan.seconds) == (None, 60.0)
    assert changed["only"].plan.batch_size == 3, "the last one counts"


PLANS = {
    "steps": (-3, 0, 2.5, "3", True, 10**400),
    "seconds": (0.0, -1.0, math.nan, math.inf),
    "batch_size": (0, -8),
    "gradient_accumulation": (0,),
    "seed": (-1, 2**63),
    "learning_rate": (0.0, -1e-4, math.nan, math.inf),
    "warmup_steps": (-1,),
    "lr_decay_fraction": (-0.1, 1.1, math.nan),
    "min_lr_ratio": (-0.1, 2.0),
    "betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9)),
    "weight_decay": (-1.0, math.inf),
    "max_grad_norm": (0.0, -1.0, math.nan, -math.inf),
    "ema_decay": (-0.1, 1.0, math.nan),
    "precision": ("fp8",),
    "parallelism": ("both",),
    "save_seconds": (-1.0, math.nan),
    "log_steps": (0,),
    "sample_steps": (-1,),
    "keep_checkpoints": (0,),
    "folder": ("runs",),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PLANS.items() for value in values])
def test_a_plan_that_cannot_be_followed_is_refused_as_it_is_made(name: str, value: object) -> None:
    settings: dict[str, Any] = {"folder": Path("run"), "steps": 10, name: value}
    with pytest.raises(InputError, match=name) as raised:
        Plan(**settings)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_grad_norm", math.inf),
        ("save_seconds", math.inf),
        ("ema_decay", 0.0),
        ("lr_decay_fraction", 1.0),
        ("warmup_steps", 0),
        ("learning_rate", 1000),
    ],
)
def test_the_ends_of_what_can_be_are_in_it(name: str, value: object) -> None:
    settings: dict[str, Any] = {"folder": Path("run"), "steps": 10, name: value}
    assert getattr(Plan(**settings), name) == value
