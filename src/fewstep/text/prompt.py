"""Prompts as windows of tokens, long ones in several windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.text.tokenizer import Tokenizer

LARGEST_PROMPT = 8192  # characters
LARGEST_CHUNKS = 10
COMMA_REACH = 20  # tokens at the end of a chunk in which a comma ends it early


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch of prompts, each in the same number of windows.

    `ids` is (B, chunks, window) int64, every window with its bos, eos and padding. `used` and `dropped` count each
    prompt's own tokens that are in `ids`, and those that were cut off.
    """

    ids: Tensor
    used: tuple[int, ...]
    dropped: tuple[int, ...]


def tokenize(prompts: Sequence[str], tokenizer: Tokenizer, *, chunk: bool = True, chunks: int = 1) -> Tokens:
    """The tokens of `prompts`, which all get as many windows as the longest needs, and at least `chunks`.

    Pass prompts and negative prompts in one call, so that they match. Prompts over the window are split, after a late
    comma where there is one; with `chunk` False they are cut, as in diffusers, and `dropped` says by how much. Raises
    `InputError` for a prompt over 8192 characters or 10 windows.
    """
    room, commas = tokenizer.window - 2, tokenizer.encode(",")
    comma = commas[0] if len(commas) == 1 and commas[0] != tokenizer.unk else None
    encoded = [_encoded(prompt, tokenizer) for prompt in prompts]
    split = [_chunks(tokens if chunk else tokens[:room], room, comma) for tokens in encoded]
    used = tuple(sum(map(len, parts)) for parts in split)
    most = max(chunks, *map(len, split), 1)
    if most > LARGEST_CHUNKS:
        raise InputError(f"a prompt needs {most} windows of {room} tokens; the limit is {LARGEST_CHUNKS}")
    rows = [[_window(part, tokenizer) for part in parts + [[]] * (most - len(parts))] for parts in split]
    return Tokens(
        ids=torch.tensor(rows, dtype=torch.int64).reshape(len(rows), most, tokenizer.window),
        used=used,
        dropped=tuple(len(tokens) - used_count for tokens, used_count in zip(encoded, used, strict=True)),
    )


def _encoded(prompt: str, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(prompt, str):
        raise InputError(f"the prompt {prompt!r} is not text")
    if len(prompt) > LARGEST_PROMPT:
        raise InputError(f"a prompt has {len(prompt)} characters; the limit is {LARGEST_PROMPT}")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise InputError(f"the prompt {prompt[:40]!r} holds half a character (a lone surrogate)")
    return tokenizer.encode(prompt)


def _chunks(tokens: list[int], room: int, comma: int | None) -> list[list[int]]:
    chunks = []
    while len(tokens) > room:
        reach = range(room, room - min(COMMA_REACH, room // 2), -1)
        end = next((end for end in reach if tokens[end - 1] == comma), room)
        chunks.append(tokens[:end])
        tokens = tokens[end:]
    return [*chunks, tokens]


def _window(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    padding = [tokenizer.pad] * (tokenizer.window - 2 - len(tokens))
    return [tokenizer.bos, *tokens, tokenizer.eos, *padding]
