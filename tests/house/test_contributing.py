"""CONTRIBUTING.md tells the rules that the house tests check: the same floors, and files that exist."""

from __future__ import annotations

import re

import pytest

from tests.house.test_house import FLOORS, FOR_ALL, ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACES = (ROOT, ROOT / "src" / "fewstep", ROOT / "tests" / "house")


def floors_of_the_page() -> dict[str, int]:
    """The table of rooms: rows of `| floor | room, room |`."""
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
    return {room.strip(" `"): int(floor) for floor, rooms in rows for room in rooms.split(",")}


def test_the_table_of_floors_is_the_one_that_is_checked():
    page = floors_of_the_page()
    differing = sorted(room for room in page.keys() | FLOORS.keys() if page.get(room) != FLOORS.get(room))
    advice = "make the table of CONTRIBUTING.md equal to FLOORS in tests/house/test_house.py"
    assert not differing, f"{', '.join(differing)}: {advice}"


def test_the_rooms_that_every_floor_may_import_are_named():
    sentence = re.search(r"every floor may import (.+?)\.", PAGE, flags=re.DOTALL)
    assert sentence, "CONTRIBUTING.md does not say which rooms every floor may import"
    assert set(re.findall(r"`(\w+)`", sentence[1])) == FOR_ALL


@pytest.mark.parametrize("section", ["Add a sampler", "Add a network", "Add an engine", "Add a metric"])
def test_a_section_names_the_files_to_write_and_the_traps(section):
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    assert "Tests" in text
    assert "Traps: " in text


def test_the_files_that_the_page_names_exist():
    named = {name for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|txt|toml))`", PAGE) if "<" not in name}
    missing = sorted(name for name in named if not any((place / name).exists() for place in PLACES))
    assert not missing, f"CONTRIBUTING.md names files that are not there: {', '.join(missing)}"
