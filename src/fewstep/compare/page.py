"""The HTML page on which people compare images; it works from a folder, without a server or a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from fewstep.compare.votes import QUESTIONS

_PLACEHOLDER = '{"study": null}'


def page(study: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The text of `index.html` for the study with the digest `study` and `pairs` of (id, prompt).

    It opens from a folder without a server, contains neither models nor key, and its content security policy lets it
    load nothing but the images beside it.
    """
    content = {
        "study": study,
        "questions": [{"id": name, "text": text} for name, text in QUESTIONS.items()],
        "pairs": [{"id": name, "prompt": prompt} for name, prompt in pairs],
    }
    text = files("fewstep.compare").joinpath("page.html").read_text(encoding="utf-8")
    assert text.count(_PLACEHOLDER) == 1
    return text.replace(_PLACEHOLDER, json.dumps(content).replace("<", "\\u003c"))  # no prompt ends the script
