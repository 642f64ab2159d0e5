"""Prompts as windows of tokens: long ones in several windows, weighted words with their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.text.tokenizer import Tokenizer

LARGEST_PROMPT = 8192  # characters
LARGEST_CHUNKS = 10
LARGEST_WEIGHT = 10.0
DEEPEST = 20
COMMA_REACH = 20  # tokens at the end of a chunk in which a comma ends it early
FACTORS = {"(": 1.1, "[": 1 / 1.1}
CLOSES = {")": "(", "]": "["}
ESCAPED = {r"\(", r"\)", r"\[", r"\]", r"\\"}
# Possessive (`++`), so that no text makes the search go back: time grows with the length alone.
PIECE = re.compile(r"(\\[()\[\]\\]|[()\[\]]|:\s*+([+-]?+(?:\d++\.?+\d*+|\.\d++))\s*+\)|[^()\[\]\\:]++|[\\:])")

Weighted = list[tuple[int, float]]  # ids with their weights


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch of prompts, each in the same number of windows.

    `ids` is (B, chunks, window) int64, every window with its bos, eos and padding; `weights` is float32 of
    the same shape, or None where weights were not asked for. `used` and `dropped` count each prompt's own
    tokens that are in `ids`, and those that were cut off.
    """

    ids: Tensor
    weights: Tensor | None
    used: tuple[int, ...]
    dropped: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """The number of windows per prompt."""
        return self.ids.shape[1]


def tokenize(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    chunk: bool = True,
    chunks: int = 1,
    weighted: bool = False,
) -> Tokens:
    """The tokens of `prompts`, which all get as many windows as the longest needs, and at least `chunks`.

    Pass prompts and negative prompts in one call, so that they match. Prompts over the window are split,
    after a late comma where there is one; with `chunk` False they are cut, as in diffusers, and `dropped`
    says by how much. `weighted` reads `(word:1.2)` by `parse_weights`; otherwise brackets are text. Raises
    `InputError` for a prompt over 8192 characters or 10 windows.
    """
    room = tokenizer.window - 2
    split: list[list[Weighted]] = []
    dropped = []
    for prompt in prompts:
        tokens = _weighted_ids(prompt, tokenizer, weighted)
        kept = tokens if chunk else tokens[:room]
        split.append(_chunks(kept, room, _comma(tokenizer)))
        dropped.append(len(tokens) - len(kept))
    most = max(chunks, *map(len, split), 1)
    if most > LARGEST_CHUNKS:
        raise InputError(f"a prompt needs {most} windows of {room} tokens; the limit is {LARGEST_CHUNKS}")
    rows = [[_window(part, tokenizer) for part in parts + [[]] * (most - len(parts))] for parts in split]
    both = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), most, tokenizer.window, 2)
    return Tokens(
        ids=both[..., 0].long(),
        weights=both[..., 1].float() if weighted else None,
        used=tuple(sum(map(len, parts)) for parts in split),
        dropped=tuple(dropped),
    )


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """`prompt` as pieces of text with their weights, in the notation of AUTOMATIC1111's web UI.

    `(x)` is 1.1 times, `[x]` 1 / 1.1 times, `(x:1.2)` 1.2 times what is around it; a backslash makes a
    bracket text; a bracket left open reaches to the end, a closing one without its opening is text. Takes
    linear time. Raises `InputError` for over 20 open brackets or a weight outside -10 to 10.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where, counted in pieces, each open bracket began
    for match in PIECE.finditer(prompt):
        piece, weight = match.groups()
        if piece in opened:
            opened[piece].append(len(pieces))
            if len(opened["("]) + len(opened["["]) > DEEPEST:
                raise InputError(f"over {DEEPEST} brackets are open at character {match.start()}: {prompt!r:.60}")
        elif weight and opened["("]:
            _scale(pieces, opened["("].pop(), float(weight))
        elif opened.get(CLOSES.get(piece, "")):
            _scale(pieces, opened[CLOSES[piece]].pop(), FACTORS[CLOSES[piece]])
        else:
            pieces.append((piece[1:] if piece in ESCAPED else piece, 1.0))
    for bracket, starts in opened.items():
        for start in starts:
            _scale(pieces, start, FACTORS[bracket])
    return _joined(pieces)


def _scale(pieces: list[tuple[str, float]], start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _joined(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    runs: list[tuple[list[str], float]] = []
    for text, weight in pieces:
        if not abs(weight) <= LARGEST_WEIGHT:  # NaN too
            raise InputError(f"the weight {weight:g} of {text[:40]!r} is not within -10 to 10")
        if runs and runs[-1][1] == weight:
            runs[-1][0].append(text)
        else:
            runs.append(([text], weight))
    return [("".join(texts), weight) for texts, weight in runs]


def _weighted_ids(prompt: str, tokenizer: Tokenizer, weighted: bool) -> Weighted:
    if not isinstance(prompt, str):
        raise InputError(f"the prompt {prompt!r} is not text")
    if len(prompt) > LARGEST_PROMPT:
        raise InputError(f"a prompt has {len(prompt)} characters; the limit is {LARGEST_PROMPT}")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise InputError(f"the prompt {prompt[:40]!r} holds half a character (a lone surrogate)")
    pieces = parse_weights(prompt) if weighted else [(prompt, 1.0)]
    return [(index, weight) for text, weight in pieces for index in tokenizer.encode(text)]


def _comma(tokenizer: Tokenizer) -> int | None:
    ids = tokenizer.encode(",")
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk else None


def _chunks(tokens: Weighted, room: int, comma: int | None) -> list[Weighted]:
    chunks = []
    while len(tokens) > room:
        reach = range(room, room - min(COMMA_REACH, room // 2), -1)
        end = next((end for end in reach if tokens[end - 1][0] == comma), room)
        chunks.append(tokens[:end])
        tokens = tokens[end:]
    return [*chunks, tokens]


def _window(tokens: Weighted, tokenizer: Tokenizer) -> Weighted:
    padding = [(tokenizer.pad, 1.0)] * (tokenizer.window - 2 - len(tokens))
    return [(tokenizer.bos, 1.0), *tokens, (tokenizer.eos, 1.0), *padding]
