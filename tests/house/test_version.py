"""The version is in one place: what is built, shown and written down comes from src/fewstep/version.py."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from tests.house.test_house import ROOT, SRC

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WITHOUT_METADATA = """
import importlib.metadata, sys

def version(name, known=importlib.metadata.version):
    assert name != "fewstep", "the installed package was asked for its version"
    return known(name)

importlib.metadata.version = version
from fewstep.cli import main
sys.exit(main(["--version"]))
"""


def version() -> str:
    found = re.findall(
        r'^__version__ = "(\d+\.\d+\.\d+\S*)"$', (SRC / "version.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(found) == 1, 'src/fewstep/version.py must hold one line of the form __version__ = "1.2.3"'
    return str(found[0])


def test_the_build_reads_the_version_where_it_is_written():
    project = PYPROJECT["project"]
    assert "version" not in project, "pyproject.toml states a version of its own; take it out"
    assert project["dynamic"] == ["version"]
    assert ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"] == SRC / "version.py"
    assert version()


def test_no_other_file_of_the_package_states_it():
    stated = re.compile(rf"""["']{re.escape(version())}["']""")
    files = [ROOT / "pyproject.toml", *SRC.rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in files if stated.search(path.read_text(encoding="utf-8"))]
    assert found == ["src/fewstep/version.py"], f"{found}: import __version__ from fewstep.version"


def test_the_command_shows_it_whatever_is_installed():
    command = [sys.executable, "-c", WITHOUT_METADATA]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.returncode, run.stdout) == (0, f"fewstep {version()}\n"), run.stderr
