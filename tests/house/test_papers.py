"""What the repository says of itself: its commands, pins, links and files, and no one machine."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red cube on top of a blue sphere"
GENERATE = f'pip install -c constraints.txt -e . && fewstep generate "{PROMPT}" -o cube.png'
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest'
LARGEST_FILE = 16_000_000

# The brackets keep these patterns from finding themselves.
FORBIDDEN = {
    r"py[p]i\.(org|io|python)|pythonhoste[d]|download\.pytorc[h]": "names a package host",
    r"index-ur[l]|find-link[s]": "sets up a package host",
    r"(?<![\w.~*])/(wor[k]|tm[p]|roo[t]|home/\w+|opt/\w+|Users/\w+)/": "holds a path of one machine",
}


@cache
def repository() -> tuple[Path, ...]:
    """The files that belong to the repository: tracked, or not ignored."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file())


def text(path: Path) -> str:
    """A file's text; empty for one that holds none."""
    content = path.read_bytes()
    if b"\0" in content[:8192]:
        return ""
    return content.decode("utf-8", errors="ignore")


def fail_if(breaches: list[str], advice: str) -> None:
    if breaches:
        pytest.fail("\n".join([*breaches, f"=> {advice}"]), pytrace=False)


@pytest.mark.parametrize("command", [GENERATE, TEST], ids=["generate", "test"])
def test_the_readme_has_both_commands(command):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(command) == 1, f"README.md must hold this line exactly once, alone:\n{command}"


def test_ci_runs_the_readme_s_test_command():
    script = ROOT / ".ci" / "run"
    pattern = re.search(r"grep -E '([^']+)' README\.md", script.read_text(encoding="utf-8"))
    assert pattern, ".ci/run must take the test command from README.md by grep -E '...' README.md"
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if re.search(pattern[1], line)]
    assert found == [TEST], f".ci/run would run {found}; it must find {TEST!r} alone"
    assert os.access(script, os.X_OK), ".ci/run must be executable: chmod +x .ci/run"


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    wanted = [*project["dependencies"], *(need for extra in extras for need in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)]
    assert not wrong, f"constraints.txt: {wrong} are not of the form name==version, without a local +suffix"
    names = {pin.partition("==")[0] for pin in pins}
    needs = {re.match(r"[\w-]+", need)[0].lower().replace("_", "-") for need in wanted}
    missing = needs - names - {"fewstep", "triton"}  # torch pins the Triton that it works with
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


def test_the_package_is_whole():
    for name in ("LICENSE", "NOTICE", "src/fewstep/py.typed"):
        assert (ROOT / name).is_file(), f"{name} is missing; the wheel needs it"


def test_no_file_is_over_16_mb():
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in repository()}
    breaches = [f"{path}: {size:,} bytes" for path, size in sizes.items() if size > LARGEST_FILE]
    fail_if(breaches, "store weights in half precision, split them by part, or train a smaller model")


def test_no_machine_and_no_package_host_is_named():
    breaches = []
    for path in repository():
        for number, line in enumerate(text(path).splitlines(), 1):
            for pattern, what in FORBIDDEN.items():
                if found := re.search(pattern, line):
                    breaches.append(f"{path.relative_to(ROOT)}:{number}: {found[0]!r} {what}")
    fail_if(breaches, "write a relative path, or leave it out; in tests use tmp_path")
