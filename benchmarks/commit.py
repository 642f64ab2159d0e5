"""The commit that a results file states: the one it measured."""

from __future__ import annotations

import argparse

from fewstep.evaluate.environment import source_commit

COMMIT_HELP = "the commit that is measured, where git does not know it (a copy of the files on another machine)"


def add_commit_option(parser: argparse.ArgumentParser) -> None:
    """Add `--commit` to a benchmark's command line."""
    parser.add_argument("--commit", default="", help=COMMIT_HELP)


def commit_line(stated: str = "") -> str:
    """`Commit: abc1234.` of the commit that the command line stated, or else of the source that is imported."""
    return f"Commit: {stated or source_commit()}."
