"""Prompts and sizes as what the UNet is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.engines.engine import Conditioning, Engine
from fewstep.pipeline.options import Job
from fewstep.text.prompt import Tokens, tokenize
from fewstep.weights.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """The conditions of a job with and without its prompts, and what became of the tokens.

    `uncond` is None where guidance does not act.
    """

    cond: Conditioning
    uncond: Conditioning | None
    used: tuple[int, ...]
    dropped: tuple[int, ...]
    chunks: int

    def with_channels(self, channels: Tensor) -> Prompted:
        """The same with the mask and masked latents (B, 5, h, w) that inpainting UNets read."""
        uncond = self.uncond and replace(self.uncond, channels=channels)
        return replace(self, cond=replace(self.cond, channels=channels), uncond=uncond)


def encode_prompts(parts: Parts, engine: Engine, job: Job) -> Prompted:
    """The conditions for `job`; every different text is encoded once."""
    guided = job.guidance.scale > 1
    zeroed = job.negative_prompts is None and parts.force_zeros_for_empty_prompt
    negatives = job.negative_prompts or ("",) * len(job.prompts)
    texts = list(dict.fromkeys((*job.prompts, *(negatives if guided and not zeroed else ()))))
    tokens = _tokens(parts, texts, chunk=job.chunk)
    context, pooled = engine.encode_text([each.ids for each in tokens])
    row = {text: i for i, text in enumerate(texts)}

    def conditioning(prompts: tuple[str, ...], score: float) -> Conditioning:
        rows = torch.tensor([row[text] for text in prompts], device=context.device)
        sizes = _sizes(parts, job, score)
        return Conditioning(context=context[rows], pooled=None if pooled is None else pooled[rows], sizes=sizes)

    size = job.size_conditioning
    cond = conditioning(job.prompts, size.aesthetic_score)
    uncond = None
    if guided and zeroed:
        uncond = _blank(cond, _sizes(parts, job, size.negative_aesthetic_score))
    elif guided:
        uncond = conditioning(negatives, size.negative_aesthetic_score)
    rows = [row[text] for text in job.prompts]
    return Prompted(
        cond=cond,
        uncond=uncond,
        used=tuple(tokens[0].used[i] for i in rows),
        dropped=tuple(tokens[0].dropped[i] for i in rows),
        chunks=tokens[0].ids.shape[1],
    )


def _tokens(parts: Parts, texts: list[str], *, chunk: bool) -> list[Tokens]:
    tokens = [tokenize(texts, tokenizer, chunk=chunk) for tokenizer in parts.tokenizers]
    most = max(each.ids.shape[1] for each in tokens)
    return [
        each if each.ids.shape[1] == most else tokenize(texts, tokenizer, chunk=chunk, chunks=most)
        for each, tokenizer in zip(tokens, parts.tokenizers, strict=True)
    ]


def _blank(like: Conditioning, sizes: Tensor | None) -> Conditioning:
    """No prompt at all, as SDXL was trained: zeros instead of the states of an empty text."""
    pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
    return Conditioning(context=torch.zeros_like(like.context), pooled=pooled, sizes=sizes)


def _sizes(parts: Parts, job: Job, score: float) -> Tensor | None:
    """The size numbers (B, 6) of SDXL's base: original, crop, target; or (B, 5) of its refiner, the score last."""
    count = parts.unet.config.size_numbers
    if not count:
        return None
    size, drawn = job.size_conditioning, (job.height, job.width)
    last = (size.target or drawn) if count == 6 else (score,)
    numbers = (*(size.original or drawn), *size.crop, *last)
    return torch.tensor([numbers], dtype=torch.float32).repeat(len(job.prompts), 1)
