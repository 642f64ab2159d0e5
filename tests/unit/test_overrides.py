"""Settings changed from the command line: typed, and refused with the nearest name."""

from __future__ import annotations

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
    changed = overridden(runs, ["plan.rate=0.5", "second.inner.size=128", "inner.kind=fancy"])
    assert [run.plan.rate for run in changed.values()] == [0.5, 0.5]
    assert [run.inner.size for run in changed.values()] == [64, 128]
    assert changed["first"].inner.kind == "fancy"
    assert runs["second"].inner.size == 64


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("plan.raet=1", "did you mean 'rate'"),
        ("inner.size.x=1", "has no setting"),
        ("inner.size", "key=value"),
        ("plan.precision=fp8", "one of fp32"),
        ("plan.batch=0", "at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        overridden({"only": Outer()}, [setting])
