"""Prompts and sizes as the UNet's conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.engines.engine import Conditioning, Engine
from fewstep.pipeline.request import Request
from fewstep.text.prompt import Tokens, tokenize
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.model import ModelSpec

Conditions = tuple[Conditioning, Conditioning | None]
"""With the prompts, and without them where guidance acts."""


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """Tensors from which an engine computes the conditions of B pictures; T different texts.

    `tensors`: `rows` (B,), which text each picture has; `negative_rows`, its negative one, None where guidance does not
    act or is done without a text (`blank`); `sizes` and `negative_sizes` (B, 6 or 5) of SDXL alone; then the token ids
    of each text tower, (T, chunks, window).
    """

    tensors: tuple[Tensor | None, ...]
    blank: bool

    def conditions(self, engine: Engine, tensors: Sequence[Tensor | None] | None = None) -> Conditions:
        """The conditions that `engine` computes of the tensors, or of others in their places."""
        rows, negative_rows, sizes, negative_sizes, *ids = self.tensors if tensors is None else tensors
        context, pooled = engine.encode_text([each for each in ids if each is not None])

        def of(rows: Tensor, sizes: Tensor | None) -> Conditioning:
            rows = rows.to(context.device)
            return Conditioning(context=context[rows], pooled=None if pooled is None else pooled[rows], sizes=sizes)

        assert rows is not None
        cond = of(rows, sizes)
        if self.blank:
            return cond, _blank(cond, negative_sizes)
        return cond, None if negative_rows is None else of(negative_rows, negative_sizes)


def with_channels(conditions: Conditions, channels: Tensor) -> Conditions:
    """The same with the mask and masked latents (B, 5, h, w) that inpainting UNets read."""
    cond, uncond = conditions
    return replace(cond, channels=channels), uncond and replace(uncond, channels=channels)


def prompt_inputs(
    spec: ModelSpec, tokenizers: Sequence[Tokenizer], request: Request
) -> tuple[PromptInputs, dict[str, Any]]:
    """The tokens and sizes of `request`, every different text once; and what `Result` says of the tokens."""
    guided = request.guidance.scale > 1
    blank = guided and request.negative_prompts is None and spec.force_zeros_for_empty_prompt
    negatives = request.negative_prompts or ("",) * len(request.prompts)
    texts = list(dict.fromkeys((*request.prompts, *(negatives if guided and not blank else ()))))
    tokens, row = _tokens(tokenizers, texts, chunk=request.chunk), {text: i for i, text in enumerate(texts)}
    size, rows = request.size_conditioning, [row[text] for text in request.prompts]
    tensors = (
        torch.tensor(rows),
        torch.tensor([row[text] for text in negatives]) if guided and not blank else None,
        _sizes(spec, request, size.aesthetic_score),
        _sizes(spec, request, size.negative_aesthetic_score) if guided else None,
        *(each.ids for each in tokens),
    )
    counts = {
        "tokens_used": tuple(tokens[0].used[i] for i in rows),
        "tokens_dropped": tuple(tokens[0].dropped[i] for i in rows),
        "chunks": tokens[0].ids.shape[1],
    }
    return PromptInputs(tensors=tensors, blank=blank), counts


def _tokens(tokenizers: Sequence[Tokenizer], texts: list[str], *, chunk: bool) -> list[Tokens]:
    tokens = [tokenize(texts, tokenizer, chunk=chunk) for tokenizer in tokenizers]
    most = max(each.ids.shape[1] for each in tokens)
    return [
        each if each.ids.shape[1] == most else tokenize(texts, tokenizer, chunk=chunk, chunks=most)
        for each, tokenizer in zip(tokens, tokenizers, strict=True)
    ]


def _blank(like: Conditioning, sizes: Tensor | None) -> Conditioning:
    """No prompt at all, as SDXL was trained: zeros instead of the states of an empty text."""
    pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
    return Conditioning(context=torch.zeros_like(like.context), pooled=pooled, sizes=sizes)


def _sizes(spec: ModelSpec, request: Request, score: float) -> Tensor | None:
    """The size numbers (B, 6) of SDXL's base: original, crop, target; or (B, 5) of its refiner, the score last."""
    count = spec.unet.size_numbers
    if not count:
        return None
    size, drawn = request.size_conditioning, (request.height, request.width)
    last = (size.target or drawn) if count == 6 else (score,)
    numbers = (*(size.original or drawn), *size.crop, *last)
    return torch.tensor([numbers], dtype=torch.float32).repeat(len(request.prompts), 1)
