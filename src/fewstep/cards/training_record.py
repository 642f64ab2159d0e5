"""The record of a training, `training.json` beside the weights, from which the model card is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fewstep.cards.emissions import Emissions
from fewstep.errors import InputError, unknown

FILE = "training.json"
FORMAT = 1
RELATIONS = ("finetune", "adapter", "merge", "distilled")
Setting = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A model that this one was initialized or distilled from; `relation` is one of `RELATIONS`."""

    name: str
    licence: str
    relation: str

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise InputError(unknown("relation", self.relation, RELATIONS))


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Training images and captions; `digest` identifies the split or the manifest of the shards."""

    what: str
    digest: str
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """One stage; `batch` over all devices, `watts` the mean power of all the hardware, in `hours` of wall time.

    `steps` is None where the number is unknown.
    """

    name: str
    steps: int | None
    batch: int
    precision: str
    hours: float
    watts: float
    hardware: str
    settings: Mapping[str, Setting]

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "hours", "watts"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise InputError(f"stage {self.name}: {name} {value} is not a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured value, with the ends of its 95 % interval and the number of images where it has them."""

    what: str
    value: float
    how: str
    low: float | None = None
    high: float | None = None
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The training of a model and its scores; saved as `training.json` in the model's folder.

    `summary`: a paragraph for people. `example`: a prompt for it. `licence`: its own; the card states the
    strictest of it and of those of the ancestors. `limits`: a sentence each, bias among them. `kg_per_kwh`, `pue` and
    `power_source` are those of `Emissions`, for all stages.
    """

    name: str
    summary: str
    example: str
    licence: str
    data: tuple[DataSource, ...]
    stages: tuple[TrainingStage, ...]
    limits: tuple[str, ...]
    kg_per_kwh: float
    pue: float = 1.0
    power_source: str = "assumed"
    ancestors: tuple[Ancestor, ...] = ()
    scores: tuple[Score, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError(f"{self.name}: no stages; a model that was not trained has no card")
        self.emissions  # noqa: B018, to refuse intensities that cannot be

    @property
    def hours(self) -> float:
        """Wall time of all stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def emissions(self) -> Emissions:
        """Of all stages together, with their mean power."""
        joules = sum(stage.hours * stage.watts for stage in self.stages)
        return Emissions(
            hours=self.hours,
            watts=joules / self.hours if self.hours else 0.0,
            kg_per_kwh=self.kg_per_kwh,
            pue=self.pue,
            power_source=self.power_source,
        )

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"fewstep_training": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingRecord:
        """What `to_json` wrote, or people by hand; InputError names the entry that is missing, unknown or wrong."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("fewstep_training", None) != FORMAT:
            raise InputError(f'not the record of a training; it starts with "fewstep_training": {FORMAT}')
        training = _read(cls, content, "")
        assert isinstance(training, cls)
        return training


def read_training(folder: Path) -> TrainingRecord:
    """The record in a model's folder; InputError if it is missing or wrong."""
    path = folder / FILE
    try:
        return TrainingRecord.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {FILE}, which says how it was trained; see docs/cards.md") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def read_scores(path: Path) -> tuple[Score, ...]:
    """Scores from a JSON file that holds a list of them; InputError for anything else."""
    try:
        scores = _read(tuple[Score, ...], json.loads(path.read_text(encoding="utf-8")), "scores")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error
    assert isinstance(scores, tuple)
    return scores


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as the type `kind`; `where` it stands is for the error."""
    if is_dataclass(kind):
        return _read_record(kind, value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read(get_args(kind)[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if get_origin(kind) is Mapping and isinstance(value, dict):
        return {name: _read(get_args(kind)[1], entry, f"{where}.{name}") for name, entry in value.items()}
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        return float(value)
    names = " or ".join("null" if one is NoneType else getattr(one, "__name__", str(one)) for one in allowed)
    raise InputError(f"{where} is {value!r}, and should be {names}")


def _read_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where or 'the file'} is {value!r}, and should be an object")
    hints, dot = get_type_hints(kind), f"{where}." if where else ""
    for name in value:
        if name not in hints:
            raise InputError(unknown("entry", f"{dot}{name}", [f"{dot}{known}" for known in hints]))
    for field in fields(kind):
        if field.default is MISSING and field.name not in value:
            raise InputError(f"{dot}{field.name} is missing")
    return kind(**{name: _read(hints[name], entry, f"{dot}{name}") for name, entry in value.items()})
