"""The page in a real browser, opened from its folder: keys, memory, sides, and files that the tally takes.

Needs the package playwright and a Chromium: that of `playwright install chromium`, one on the path, or the file that
the variable FEWSTEP_CHROMIUM names.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.compare.study import SCRAMBLED, ImageSet, Study, make_study
from fewstep.compare.tally import aggregate_votes
from fewstep.compare.votes import QUESTIONS, RaterVotes, read_votes

PROMPTS = ["a red cube", 'a "blue" <b>sphere</b> & more', "ein grüner Würfel", "four"]
COLOURS = {"a": (200, 0, 0), "b": (0, 0, 200)}

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("FEWSTEP_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as drivers:
        try:
            browser = drivers.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def study(folder: Path) -> Study:
    image_sets = {
        label: ImageSet(settings={}, images=[Image.new("RGB", (32, 32), colour)] * len(PROMPTS))
        for label, colour in COLOURS.items()
    }
    return make_study(image_sets, PROMPTS, folder, seed=1, checks=1)


@pytest.fixture
def visit(browser: Any, folder: Path, study: Study) -> Iterator[Visit]:
    """Opens the page as a rater does; it may complain of nothing, and ask for nothing but its own files."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 1000})
    trouble: list[str] = []

    def opened(rater: str | None = "anna") -> Any:
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else trouble.append(asked.url),
        )
        page.goto((folder / "index.html").as_uri())
        if rater is not None:
            page.get_by_label("Your name").fill(rater)
            page.keyboard.press("Enter")
        return page

    yield opened
    context.close()
    assert trouble == []


SOURCE_OF = """async (side) => {
  const image = document.getElementById(side);
  await image.decode();
  return image.src;
}"""


def downloaded(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button).click()
    path = folder.parent / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def drawn_by(study: Study, source: str) -> str:
    """Who drew the picture that the page shows from `source`."""
    name = source.rpartition("/")[2]
    return next(
        label
        for pair in study.pairs
        for path, label in zip(pair.paths, pair.drawn_by, strict=True)
        if path.endswith(name)
    )


def sources(page: Any) -> list[str]:
    """The pictures on the left and on the right, when they can be seen."""
    return [page.evaluate(SOURCE_OF, side) for side in ("left", "right")]


def vote_for(page: Any, study: Study, model: str) -> list[int]:
    """Answer everything by keys: for `model`, in checks for what is not scrambled; the sides it was on."""
    sides = []
    while page.locator("#trial").is_visible():
        labels = [drawn_by(study, source) for source in sources(page)]
        wanted = next(label for label in labels if label != SCRAMBLED) if SCRAMBLED in labels else model
        sides.append(labels.index(wanted))
        page.keyboard.press("12"[sides[-1]])
    return sides


def read(path: Path, study: Study) -> RaterVotes:
    return read_votes(path, study.digest, {pair.id for pair in study.pairs})


def test_votes_by_keys_come_back_as_a_file_that_the_tally_takes(visit, study, folder):
    page = visit("Zoë “Z” Ünal")
    sides = vote_for(page, study, "b")
    assert set(sides) == {0, 1}
    assert page.locator("#end").is_visible()
    rater_votes = read(downloaded(page, "Save votes (JSON)", folder), study)
    assert rater_votes.rater == "Zoë “Z” Ünal"
    outcome = aggregate_votes(study, [rater_votes])
    assert [(t.question, t.votes.for_first, t.votes.for_second) for t in outcome.tallies] == [
        ("quality", 0, 4),
        ("alignment", 0, 4),
    ]
    with downloaded(page, "Save a table (CSV)", folder).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pair"], row["question"], row["choice"]) for row in rows] == [
        tuple(vote) for vote in rater_votes.votes
    ]
    assert {row["prompt"] for row in rows} <= set(PROMPTS)


def test_ties_and_steps_back(visit, study, folder):
    page = visit()
    page.keyboard.press("1")
    page.keyboard.press("Backspace")
    page.keyboard.press("0")
    page.get_by_role("button", name="Left").click()
    page.get_by_role("button", name="Back").click()
    page.get_by_role("button", name="No difference").click()
    votes = read(downloaded(page, "Save votes (JSON)", folder), study).votes
    assert [vote.choice for vote in votes] == ["tie", "tie"]
    assert [vote.question for vote in votes] == list(QUESTIONS)


def test_the_page_remembers_votes_and_goes_on(visit, study):
    page = visit()
    for key in "120":
        page.keyboard.press(key)
    before = sources(page)
    page.close()
    page = visit(None)
    assert page.get_by_label("Your name").input_value() == "anna"
    page.get_by_role("button", name="Start").click()
    assert page.locator("#progress").inner_text() == f"4 of {2 * len(study.pairs)}"
    assert sources(page) == before


def test_raters_see_their_own_order_and_sides(visit, study):
    def seen(rater: str) -> list[tuple[str, ...]]:
        page, found = visit(rater), []
        while page.locator("#trial").is_visible():
            found.append(tuple(sources(page)))
            page.keyboard.press("0")
        return found

    first, second = seen("anna"), seen("bert")
    assert first != second
    assert {frozenset(pair) for pair in first} == {frozenset(pair) for pair in second}


def test_the_prompt_is_shown_as_text_and_only_for_the_second_question(visit, study):
    page, said = visit(), set()
    while page.locator("#trial").is_visible():
        assert page.locator("#prompt").inner_text() == ""
        page.keyboard.press("0")
        said.add(page.locator("#prompt").inner_text().strip("“”"))
        page.keyboard.press("0")
    assert said == set(PROMPTS)


def test_the_page_can_be_used_without_a_mouse_or_a_screen(visit, study):
    page = visit()
    assert page.evaluate("document.activeElement.id") == "question"
    for name in ("Picture on the left", "Picture on the right"):
        assert page.get_by_alt_text(name).is_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the left picture is a button
    assert page.locator("#progress").inner_text().startswith("2 of")
    page.keyboard.press("Control+1")
    assert page.locator("#progress").inner_text().startswith("2 of")
    named = page.evaluate("[...document.querySelectorAll('button')].every((b) => b.textContent.trim())")
    assert named


def test_nothing_can_be_saved_before_a_vote(visit):
    page = visit()
    assert not page.get_by_role("button", name="Save votes (JSON)").is_visible()
