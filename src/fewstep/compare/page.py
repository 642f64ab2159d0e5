"""The page on which people compare pictures: one HTML file that asks nothing of any network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from fewstep.compare.votes import QUESTIONS

_PLACE = '{"study": null}'


def page(study: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The text of `index.html` for the study with the digest `study` and `pairs` of (id, prompt).

    It opens from a folder without a server, knows neither models nor key, and its security policy lets it load
    nothing but the pictures beside it.
    """
    asked = {
        "study": study,
        "questions": [{"id": name, "text": text} for name, text in QUESTIONS.items()],
        "pairs": [{"id": name, "prompt": prompt} for name, prompt in pairs],
    }
    text = files("fewstep.evaluate").joinpath("compare.html").read_text(encoding="utf-8")
    assert text.count(_PLACE) == 1
    return text.replace(_PLACE, json.dumps(asked).replace("<", "\\u003c"))  # no prompt ends the script
