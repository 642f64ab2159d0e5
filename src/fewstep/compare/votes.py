"""Votes on pairs of images: the files that the page saves, read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.errors import InputError, unknown

QUESTIONS: Mapping[str, str] = {
    "quality": "Which picture is better made?",
    "alignment": "Which picture shows better what the words say?",
}
"""What raters are asked about each pair, by the name in the files; the first before they see the prompt."""
CHOICES = ("1", "2", "tie")
"""What a vote can be for: image 1 of the pair, image 2, or neither."""
FORMAT = 1


class Vote(NamedTuple):
    """One answer: the pair's id, the question's name, and one of `CHOICES`."""

    pair: str
    question: str
    choice: str


@dataclass(frozen=True, kw_only=True)
class RaterVotes:
    """All votes of one rater on the study with the digest `study`; `judged_by` names the rater if it is a model."""

    study: str
    rater: str
    votes: tuple[Vote, ...]
    judged_by: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the lines of the votes, which the page computes in the same way.

        It shows damage and careless edits. It is no signature: whoever forges votes can compute it too.
        """
        lines = [self.study, self.rater, self.judged_by or "", *(" ".join(vote) for vote in self.votes)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of a file of votes, as the page saves it."""
        content = {
            "fewstep_votes": FORMAT,
            "study": self.study,
            "rater": self.rater,
            "judged_by": self.judged_by,
            "votes": [vote._asdict() for vote in self.votes],
            "digest": self.digest,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_votes(path: Path, study: str, pairs: Collection[str]) -> RaterVotes:
    """The votes in the file at `path`, on the study with the digest `study` and the ids `pairs`.

    Raises InputError for a file that is none of this study, that is damaged or has been changed, and for votes on
    unknown pairs or questions, or given twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rater_votes, digest = _parse(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} holds no votes: {_reason(error)}; give a JSON file that the page saved") from error
    if rater_votes.study != study:
        raise InputError(f"{path} holds votes of another study ({rater_votes.study[:12]}, this is {study[:12]})")
    if rater_votes.digest != digest:
        raise InputError(f"{path} has been changed since it was saved: its digest is wrong; ask for the file again")
    _check_votes(rater_votes, pairs, path)
    return rater_votes


def _parse(content: Mapping[str, Any]) -> tuple[RaterVotes, str]:
    if content["fewstep_votes"] != FORMAT:
        raise ValueError(f"its format is {content['fewstep_votes']!r}, this version reads {FORMAT}")
    votes = tuple(Vote(**{name: _text(value) for name, value in vote.items()}) for vote in content["votes"])
    judge = None if content["judged_by"] is None else _text(content["judged_by"])
    rater_votes = RaterVotes(study=_text(content["study"]), rater=_text(content["rater"]), votes=votes, judged_by=judge)
    return rater_votes, _text(content["digest"])


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{value!r} is not a text of one line")
    return value


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _check_votes(rater_votes: RaterVotes, pairs: Collection[str], path: Path) -> None:
    if not rater_votes.rater.strip():
        raise InputError(f"{path} names no rater")
    if not rater_votes.votes:
        raise InputError(f"{path} holds no vote")
    voted: set[tuple[str, str]] = set()
    for vote in rater_votes.votes:
        if vote.pair not in pairs:
            raise InputError(f"{path} votes on pair {vote.pair!r}, which is not in the study")
        for what, name, known in (("question", vote.question, QUESTIONS), ("choice", vote.choice, CHOICES)):
            if name not in known:
                raise InputError(f"{path}, pair {vote.pair}: {unknown(what, name, known)}")
        if vote[:2] in voted:
            raise InputError(f"{path} votes twice on the {vote.question} of pair {vote.pair}")
        voted.add(vote[:2])
