"""How a command ends: its exit code and one line on stderr for an error."""

from __future__ import annotations

import os
import sys
import traceback
from enum import IntEnum

from fewstep.errors import CheckpointError, InputError, MissingExtraError, NotFiniteError, printable


class Exit(IntEnum):
    """The exit codes of `fewstep`."""

    OK = 0
    BUG = 1
    USAGE = 2
    MODEL = 3
    GENERATION = 4
    INTERRUPTED = 130


def report(error: Exception, *, debug: bool = False) -> int:
    """Print the error in one line on stderr (`debug`: after the traceback), and return the exit code."""
    if debug:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    code = code_for(error)
    print(f"error: {printable(_message(error, code))}", file=sys.stderr)
    return code


def code_for(error: Exception) -> int:
    """The exit code that `error` stands for; typer's own errors bring theirs."""
    if isinstance(error, InputError):
        return Exit.USAGE
    if isinstance(error, CheckpointError | MissingExtraError):
        return Exit.MODEL
    if isinstance(error, NotFiniteError | OSError) or _out_of_memory(error):
        return Exit.GENERATION
    return int(getattr(error, "exit_code", Exit.BUG))


def end_on_broken_pipe() -> int:
    """End quietly when the reader of stdout has exited (`fewstep models | head`); the shell's exit code for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit then fails no more
    return 128 + 13


def _message(error: Exception, code: int) -> str:
    if _out_of_memory(error):
        return "out of memory; ask for a smaller --size or fewer --images, or another --device"
    if code == Exit.BUG:
        return f"{type(error).__name__}: {error}; a bug in fewstep: please report it with what --debug shows"
    return " ".join(error.format_message().split()) if hasattr(error, "format_message") else str(error)


def _out_of_memory(error: Exception) -> bool:
    """Known by name and words: torch raises a plain RuntimeError on the CPU, and is not imported here."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
