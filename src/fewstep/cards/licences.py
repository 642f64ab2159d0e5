"""Licences of models, and the strictest of those in a chain of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence by its usual name; `rank` grows with what it forbids.

    `hub` is its name in the front matter of model cards, "other" where there is none; `link` its text.
    """

    name: str
    rank: int
    terms: str
    hub: str = "other"
    link: str | None = None


_HARM = "no harmful use: the list of forbidden uses in it must be passed on with the model and all that derives from it"
_FREE = "any use"
_KNOWN = (
    Licence(name="CC0-1.0", rank=0, terms=_FREE, hub="cc0-1.0"),
    Licence(name="MIT", rank=1, terms=f"{_FREE}, with its notice", hub="mit"),
    Licence(name="Apache-2.0", rank=1, terms=f"{_FREE}, with its notice", hub="apache-2.0"),
    Licence(name="CC-BY-4.0", rank=1, terms=f"{_FREE}, with credit", hub="cc-by-4.0"),
    Licence(name="openrail", rank=2, terms=_HARM, hub="openrail"),
    Licence(name="creativeml-openrail-m", rank=2, terms=_HARM, hub="creativeml-openrail-m"),
    Licence(name="creativeml-openrail++-m", rank=2, terms=_HARM, hub="openrail++"),
    Licence(
        name="stabilityai-ai-community",
        rank=3,
        terms="free under a yearly revenue of one million US dollars; others need an agreement with Stability AI",
        link="https://stability.ai/license",
    ),
    Licence(
        name="stabilityai-nc-research-community",
        rank=4,
        terms="research and other non-commercial use only, and no hosting for third parties",
        link="https://stability.ai/license",
    ),
)
UNKNOWN_RANK = 9


def licence_of(name: str) -> Licence:
    """The licence called `name`, whatever its capitals; an unknown one counts as the strictest."""
    known = {licence.name.lower(): licence for licence in _KNOWN}
    terms = "its terms are not known here; read them before you use or share the model"
    return known.get(name.strip().lower(), Licence(name=name.strip(), rank=UNKNOWN_RANK, terms=terms))


def strictest_licence(names: Iterable[str]) -> Licence:
    """The strictest of the licences called `names`; of equals the first."""
    return max((licence_of(name) for name in names), key=lambda licence: licence.rank)
