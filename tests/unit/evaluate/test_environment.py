"""A results file states the commit it measured, and no other one."""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from benchmarks import startup, training
from benchmarks.commit import add_commit_option, commit_line
from benchmarks.speed.options import BenchmarkOptions

from fewstep.evaluate.environment import machine, source_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A committed module in a repository that has results too."""
    path = tmp_path / "src" / "version.py"
    results = tmp_path / "benchmarks" / "results"
    for folder in (path.parent, results):
        folder.mkdir(parents=True)
    path.write_text("", encoding="utf-8")
    (results / "old.md").write_text("", encoding="utf-8")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    source_commit.cache_clear()
    return path


def test_a_clean_tree_is_its_short_hash(module, tmp_path):
    assert source_commit(module) == git(tmp_path, "rev-parse", "--short", "HEAD")


def test_uncommitted_changes_are_stated(module, tmp_path):
    (tmp_path / "src" / "new.py").write_text("x = 1\n", encoding="utf-8")
    assert source_commit(module) == f"{git(tmp_path, 'rev-parse', '--short', 'HEAD')}+changes"


def test_new_results_are_no_changes(module, tmp_path):
    (tmp_path / "benchmarks" / "results" / "new.md").write_text("", encoding="utf-8")
    assert "+changes" not in source_commit(module)


def test_outside_git_the_commit_is_unknown(tmp_path):
    assert source_commit(tmp_path / "version.py") == "unknown"


def test_a_package_installed_below_another_project_has_not_its_commit(module):
    installed = module.with_name("installed.py")
    installed.write_text("", encoding="utf-8")
    assert source_commit(installed) == "unknown"


def test_reports_and_benchmarks_state_the_commit():
    assert f"(commit {source_commit()})" in machine()
    assert commit_line() == f"Commit: {source_commit()}."
    assert BenchmarkOptions(commit="abc1234").command() == BenchmarkOptions().command()
    parser = argparse.ArgumentParser()
    add_commit_option(parser)
    assert commit_line(parser.parse_args(["--commit", "abc1234"]).commit) == "Commit: abc1234."


def test_the_pages_on_start_up_and_training_state_the_commit():
    image = {"width": 64, "height": 64, "model": "m", "runs": 1, "steps": 1, "threads": 1}
    image |= dict.fromkeys(("picture_seconds", "fastest_seconds", "slowest_seconds"), 0.1)
    page = startup.report({startup.YARDSTICK: [1.0]}, Counter({"torch": 1}), [image], None, "abc1234")
    assert "Commit: abc1234." in page
    options = argparse.Namespace(hardware="box", threads=1, batch=1, runs=1, device="cpu", commit="abc1234")
    assert "Commit: abc1234." in training.report({"fewstep": [1.0]}, {}, options)
