"""`plan.learning_rate=1e-5`: settings of a run changed from the command line, by their dotted names and types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fewstep.errors import InputError, quoted, unknown
from fewstep.train.renamed import refuse_renamed

T = TypeVar("T")
TRUE, FALSE, NONE = ("true", "yes", "1"), ("false", "no", "0"), ("none", "null", "")


def overridden(stages: Mapping[str, T], settings: Sequence[str]) -> dict[str, T]:
    """`stages` with `settings` applied: "key=value" for every stage, "stage.key=value" for one.

    Keys are dotted paths into frozen dataclasses. Raises `InputError` for an unknown key, with the nearest one, for a
    key with an old name, with the new one, and for a value that its field's type cannot hold.
    """
    chosen: dict[str, list[tuple[str, str]]] = {name: [] for name in stages}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"{quoted(setting)} is not a setting; write key=value, such as plan.learning_rate=1e-4")
        stage, _, rest = key.partition(".")
        for name in [stage] if stage in stages else list(stages):
            chosen[name].append((rest if stage in stages else key, text))
    return {name: with_settings(config, chosen[name]) for name, config in stages.items()}


def with_settings(config: T, settings: Sequence[tuple[str, str]], path: str = "") -> T:
    """A copy of the frozen dataclass `config` with the fields at dotted paths set to the values that texts parse to.

    All are set at once, since they may depend on each other. `path` precedes their names in error messages.
    """
    assert is_dataclass(config)
    names, grouped = [field.name for field in fields(config)], dict[str, list[tuple[str, str]]]()
    for key, text in settings:
        name, _, rest = key.partition(".")
        refuse_renamed(type(config), [name], path)
        if name not in names:
            raise InputError(unknown(f"setting of {type(config).__name__}", name, names))
        grouped.setdefault(name, []).append((rest, text))
    changed: dict[str, Any] = {}
    for name, inner in grouped.items():
        value, (rest, text) = getattr(config, name), inner[-1]
        if rest and not is_dataclass(value):
            raise InputError(f"{name} is {value!r} and has no setting {rest!r}")
        kind = get_type_hints(type(config))[name]
        changed[name] = with_settings(value, inner, f"{path}{name}.") if rest else parsed(text, kind, name)
    result: T = replace(config, **changed)  # type: ignore[type-var]
    return result


def settings(config: object, path: str = "") -> dict[str, str]:
    """Every setting of nested dataclasses by its dotted name."""
    assert is_dataclass(config)
    named: dict[str, str] = {}
    for field in fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        named |= settings(value, f"{name}.") if is_dataclass(value) else {name: str(value)}
    return named


def parsed(text: str, kind: Any, key: str) -> Any:
    """`text` as a value of the type `kind`: numbers, words, paths, choices, options and tuples with commas."""
    try:
        return _parsed(text, kind)
    except ValueError as error:
        raise InputError(f"{key}={quoted(text)} is not {_type_name(kind)}") from error


def _parsed(text: str, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _first(text, arguments)
    if origin is Literal:
        return (
            next(value for value in arguments if str(value) == text) if text in map(str, arguments) else _rejected(text)
        )
    if origin is tuple:
        items = [item for item in text.strip("()").split(",") if item.strip()]
        inner = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        return tuple(_parsed(item.strip(), one) for item, one in zip(items, inner, strict=True))
    if kind is bool:
        return True if text.lower() in TRUE else False if text.lower() in FALSE else _rejected(text)
    if kind is NoneType:
        return None if text.lower() in NONE else _rejected(text)
    return kind(text) if kind in (int, float, str, Path) else _rejected(text)


def _first(text: str, kinds: Sequence[Any]) -> Any:
    """The value by the first type of a union that can hold it, None before all."""
    for kind in sorted(kinds, key=lambda kind: kind is not NoneType):
        try:
            return _parsed(text, kind)
        except ValueError:
            continue
    return _rejected(text)


def _rejected(text: str) -> Any:
    raise ValueError(text)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return f"a value of type {getattr(kind, '__name__', kind) if not get_args(kind) else kind}"
