"""The commands and the Python of the README and of its two guides, pasted in their order into one shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/python.md", "docs/command-line.md")
MOST_BYTES = 8_000  # of the README
NETWORK = "needs the network"
ELSEWHERE = ("pip install", "benchmarks.", "fewstep train", "fewstep bench")  # installing, hours of training, measuring


def text() -> str:
    return "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


def pasted() -> str:
    """A script of what needs neither a network nor hours."""
    script = ["set -e"]
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", text(), flags=re.DOTALL):
        if kind == "sh":
            lines = [line.removeprefix(_install(line)) for line in block.splitlines()]
            script += [line for line in lines if not any(word in line for word in (NETWORK, *ELSEWHERE))]
        elif NETWORK not in block:
            script.append(f"python - <<'END'\nimport fewstep\npipe = fewstep.load()\n{block}END")
    return "\n".join(script)


def _install(line: str) -> str:
    """What of a line installs, before the command that it was for."""
    found = re.match(r"pip install .*? && (?=fewstep )", line)
    return found[0] if found else ""


def test_the_commands_work_in_their_order(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in (("fewstep", "-m fewstep"), ("python", "")):
        path = commands / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        path.chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-c", pasted()], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    made = {path.name for path in folder.iterdir()}
    assert {"cube.png", "torus-1.png", "torus-4.png", "green.png", "again.png", "prompts.txt", "pictures"} <= made
    assert (folder / "again.png").stat().st_size > 1000


def test_what_needs_the_network_says_so() -> None:
    named = re.compile(r"sdxl|sd-turbo|stabilityai")
    for block in re.findall(r"```(?:sh|python)\n(.*?)```", text(), flags=re.DOTALL):
        for line in block.splitlines():
            if named.search(line) and "benchmarks" not in line:
                assert NETWORK in line or NETWORK in block.splitlines()[0], line


def test_the_readme_is_read_in_minutes() -> None:
    assert (ROOT / "README.md").stat().st_size <= MOST_BYTES
