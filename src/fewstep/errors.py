"""The errors that fewstep raises, each saying what is wrong, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A value given by the user is out of range or unknown."""


class CheckpointError(ValueError):
    """A file or folder of weights cannot be loaded; nothing of it was."""


class NotFiniteError(ArithmeticError):
    """A stage of the pipeline produced NaN or infinity; the message names the stage."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


def unknown(what: str, name: str, names: Iterable[str]) -> str:
    """The message for a name that is not among `names`: the closest one, and all that there are."""
    known = list(names)
    close = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {quoted(name)}{hint} There are {', '.join(known)}"


def quoted(value: object, longest: int = 80) -> str:
    """A name, key, prompt or setting from elsewhere for a message: on one line, cut in the middle when long.

    Whatever a terminal would act on (escape codes, C1 and bidirectional controls, half surrogates) is escaped.
    """
    if hasattr(value, "__fspath__"):
        value = str(value)
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists
        text = f"{type(value).__name__} too large to show"
    if len(text) > longest:
        half = (longest - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return repr(text) if isinstance(value, str) else printable(text)


def some(names: Collection[str], shown: int = 3) -> str:
    """The first `shown` of `names` in their order, and how many more there are; what is no plain text is quoted."""
    first = (name if name.isprintable() and len(name) <= 200 else quoted(name, 200) for name in sorted(names)[:shown])
    return ", ".join(first) + (f", ... {len(names) - shown} more" if len(names) > shown else "")


def printable(text: str) -> str:
    """`text` with all that a terminal would act on escaped, line breaks excepted."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)
