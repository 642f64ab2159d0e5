"""Whether the parts of a model belong together: their widths, channels, heads, windows and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fewstep.errors import CheckpointError
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fewstep.text.tokenizer import Tokenizer

OTHER_MODELS = {
    5: "a model that also reads depth",
    7: "an upscaler, which also reads a small picture",
    8: "an InstructPix2Pix model, which also reads a picture's latents",
}
"""Models that are no text-to-image or inpainting ones, by the channels that their UNets read."""


def check_parts(
    source: Path,
    unet: UNetConfig,
    autoencoder: AutoencoderConfig,
    texts: Sequence[TextConfig],
    tokenizers: Sequence[Tokenizer] = (),
) -> None:
    """CheckpointError that names all parts of the model in `source` that cannot work with each other."""
    problems = [*_latents(unet, autoencoder), *_heads(unet, texts), *_texts(unet, texts)]
    if problems := problems or [*_tokens(unet, texts, tokenizers)]:
        raise CheckpointError(f"{source} cannot draw here:\n  " + "\n  ".join(problems))


def _latents(unet: UNetConfig, autoencoder: AutoencoderConfig) -> Iterator[str]:
    if autoencoder.latent_channels != 4:
        yield f"the autoencoder has {autoencoder.latent_channels} latent channels; SD 1, SD 2 and SDXL have 4"
    if unet.in_channels not in (4, 9):
        what = OTHER_MODELS.get(unet.in_channels, "no model of this family")
        yield f"the UNet reads {unet.in_channels} channels, as {what}; fewstep draws with 4, and inpaints with 9"
    if unet.out_channels != 4:
        yield f"the UNet predicts {unet.out_channels} channels; latents have 4"


def _heads(unet: UNetConfig, texts: Sequence[TextConfig]) -> Iterator[str]:
    levels = [stage for stage in unet.stages[:-1] if stage.depth]
    for stage in (*levels, unet.stages[-1]):  # the transformer in the middle has the last level's heads
        if stage.channels % stage.heads:
            yield f"the UNet's {stage.channels} channels cannot be shared among {stage.heads} attention heads"
    for text in texts:
        if text.width % text.heads:
            yield f"a text encoder's width {text.width} cannot be shared among {text.heads} attention heads"


def _texts(unet: UNetConfig, texts: Sequence[TextConfig]) -> Iterator[str]:
    needed = 2 if unet.size_numbers == 6 else 1
    if len(texts) != needed:
        yield f"the model has {len(texts)} text encoders; its UNet reads {needed}"
    elif (width := sum(text.width for text in texts)) != unet.context:
        yield f"the text encoders give states of width {width}; the UNet's cross-attention reads {unet.context}"
    elif unet.addition and texts[-1].projection != unet.pooled:
        yield f"the last text encoder's pooled state has width {texts[-1].projection}; the UNet reads {unet.pooled}"


def _tokens(unet: UNetConfig, texts: Sequence[TextConfig], tokenizers: Sequence[Tokenizer]) -> Iterator[str]:
    for tokenizer, text in zip(tokenizers, texts, strict=bool(tokenizers)):
        if (last := max(tokenizer.backend.get_vocab().values())) >= text.vocabulary:
            yield f"a tokenizer has tokens up to {last}, and its text encoder {text.vocabulary} of them, from 0"
        if tokenizer.window > text.window:
            yield f"a tokenizer has windows of {tokenizer.window} tokens, and its text encoder of {text.window}"
        if unet.addition and tokenizer.eos != text.eos:
            yield f"a tokenizer ends texts with token {tokenizer.eos}, and its text encoder looks for {text.eos}"
    if len(windows := {tokenizer.window for tokenizer in tokenizers}) > 1:
        yield f"the tokenizers have windows of {' and '.join(map(str, sorted(windows)))} tokens; expected the same"
