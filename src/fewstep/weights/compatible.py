"""Whether the parts of a model belong together: their widths, channels, windows and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import CheckpointError
from fewstep.weights.parts import Parts

OTHER_MODELS = {
    5: "a model that also reads depth",
    7: "an upscaler, which also reads a small picture",
    8: "an InstructPix2Pix model, which also reads a picture's latents",
}
"""Models that are no text-to-image or inpainting ones, by the channels that their UNets read."""


def check_parts(parts: Parts, source: Path) -> None:
    """CheckpointError that names every two parts of the model in `source` that cannot work with each other."""
    if problems := [*_latents(parts), *_texts(parts), *_tokens(parts)]:
        raise CheckpointError(f"{source} cannot draw here:\n  " + "\n  ".join(problems))


def _latents(parts: Parts) -> Iterator[str]:
    unet, latents = parts.unet.config, parts.autoencoder.config.latent_channels
    if latents != 4:
        yield f"the autoencoder has {latents} latent channels; SD 1, SD 2 and SDXL have 4"
    if unet.in_channels not in (4, 9):
        what = OTHER_MODELS.get(unet.in_channels, "no model of this family")
        yield f"the UNet reads {unet.in_channels} channels, as {what}; fewstep draws with 4, and inpaints with 9"
    if unet.out_channels != 4:
        yield f"the UNet predicts {unet.out_channels} channels; latents have 4"


def _texts(parts: Parts) -> Iterator[str]:
    unet, texts = parts.unet.config, [tower.config for tower in parts.text_encoders]
    needed = 2 if unet.size_numbers == 6 else 1
    if len(texts) != needed:
        yield f"the model has {len(texts)} text encoders; its UNet reads {needed}"
        return
    if (width := sum(text.width for text in texts)) != unet.context:
        yield f"the text encoders give states of width {width}; the UNet's cross-attention reads {unet.context}"
    if unet.pooled and texts[-1].projection != unet.pooled:
        yield f"the last text encoder's pooled state has width {texts[-1].projection}; the UNet reads {unet.pooled}"
    if len({text.window for text in texts}) > 1:
        yield f"the text encoders have windows of {' and '.join(str(text.window) for text in texts)} tokens"


def _tokens(parts: Parts) -> Iterator[str]:
    for tokenizer, tower in zip(parts.tokenizers, parts.text_encoders, strict=True):
        text = tower.config
        if len(tokenizer) > text.vocabulary:
            yield f"a tokenizer has {len(tokenizer)} tokens, and its text encoder {text.vocabulary}"
        if tokenizer.window > text.window:
            yield f"a tokenizer has windows of {tokenizer.window} tokens, and its text encoder of {text.window}"
        if parts.unet.config.addition and tokenizer.eos != text.eos:
            yield f"a tokenizer ends texts with token {tokenizer.eos}, and its text encoder looks for {text.eos}"
