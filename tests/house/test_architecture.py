"""docs/architecture.md against the code: its table of rooms, and the files and functions that a prompt goes through."""

from __future__ import annotations

import ast
import re

from tests.house.test_house import FLOORS, ROOT

DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_HOPS = 15
HOP = re.compile(r"(\d+)\. `(src/fewstep/[\w/]+\.py)` ((?:`[\w.]+`(?:, )?)+): \S.*")


def section(title: str) -> list[str]:
    """The lines below a heading, up to the next one."""
    _, found, rest = DOCUMENT.partition(f"\n## {title}\n")
    assert found, f"docs/architecture.md has no heading '## {title}'"
    return rest.partition("\n## ")[0].splitlines()


def hops() -> list[tuple[int, str, list[str]]]:
    """Of each numbered line of the walk: its number, its file and the names in that file."""
    lines = [line for line in section("The walk of a prompt") if re.match(r"\s*\d+\.", line)]
    matches = {line: HOP.fullmatch(line) for line in lines}
    wrong = [line for line, match in matches.items() if match is None]
    assert not wrong, f"a hop is '1. `src/fewstep/FILE.py` `NAME`, `NAME`: what it does'; these are not: {wrong}"
    return [(int(match[1]), match[2], re.findall(r"[\w.]+", match[3])) for match in matches.values() if match]


def defined(path: str) -> set[str]:
    """The functions and classes of a file, and the methods as `Class.method`."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {node.name, *(f"{node.name}.{method.name}" for method in methods)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return names


def test_the_table_of_rooms_is_that_of_the_house():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| \S.* \|$", "\n".join(section("Rooms and floors")), re.MULTILINE)
    assert len(rows) == len({room for _, room in rows}), "docs/architecture.md has a room twice"
    assert {room: int(floor) for floor, room in rows} == FLOORS


def test_a_prompt_takes_at_most_15_hops():
    numbers = [number for number, _, _ in hops()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 1 <= len(numbers) <= MOST_HOPS


def test_every_hop_is_in_the_code():
    breaches = []
    for number, path, names in hops():
        if not (ROOT / path).is_file():
            breaches.append(f"hop {number}: there is no file {path}")
            continue
        breaches += [f"hop {number}: {path} does not define {name}" for name in names if name not in defined(path)]
    assert not breaches, "\n".join(breaches)
