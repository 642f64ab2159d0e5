"""Loading a model, ready to draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fewstep.adapters.derived_model import derived_model
from fewstep.engines.device import choose_device, choose_dtype
from fewstep.engines.eager import EagerEngine
from fewstep.errors import InputError, unknown
from fewstep.models.zoo import TINY, Entry
from fewstep.pipeline.pipeline import Pipeline
from fewstep.weights.fetch import named
from fewstep.weights.load import load_parts, load_tiny

EMBEDDED = "blocks-turbo"


@torch.inference_mode(False)  # weights that can be trained, and whose changes are seen, whatever the caller's mode
def load(
    what: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    decoder: str | Path | None = None,
    engine: Literal["plain"] | None = None,
) -> Pipeline:
    """A model, ready to draw.

    `what`: a name in `fewstep.CATALOGUE`, a diffusers folder, an original single file (.safetensors, .ckpt), a hub id
    such as "stabilityai/sd-turbo", or None for the embedded model, which needs no network. `device` and `dtype`
    default to what this machine does best; "float16" on a CPU halves the memory of weights. `revision`: of the hub.
    `prediction` ("epsilon", "v_prediction", "sample") and `tokenizer` (a folder) are for single files without them.
    `decoder`: "tiny" for the tiny autoencoder of the model's family, or the name or folder of one. It makes pictures of
    latents in a fraction of the time and memory, with less detail; `docs/models.md` has what is lost. `engine`: "plain"
    for PyTorch's own operations alone, instead of the fastest engine for the device.

    Raises InputError for an unknown name, CheckpointError for files that cannot be loaded.
    """
    if engine not in (None, "plain"):
        raise InputError(unknown("engine", str(engine), ("plain",)))
    chosen, found = choose_device(device), named(EMBEDDED if what is None else what)
    known = found if isinstance(found, Entry) else None
    parts = load_parts(
        found if not isinstance(found, Entry) else found.base or found.name,
        dtype=choose_dtype(dtype, chosen),
        device=chosen,
        revision=revision,
        prediction=prediction,
        tokenizer=None if tokenizer is None else Path(tokenizer),
    )
    if known is not None and known.base is not None:
        parts = derived_model(parts, known)
    if decoder is not None:
        if (factor := parts.autoencoder.config.factor) != 8:
            raise InputError(f"{parts.name} draws pictures {factor} times as wide as latents; a tiny decoder needs 8")
        chosen_decoder = TINY[parts.family] if decoder == "tiny" else decoder
        parts = replace(parts, tiny=load_tiny(chosen_decoder, dtype=choose_dtype(dtype, chosen), device=chosen))
    asked = {"revision": revision, "prediction": prediction, "tokenizer": tokenizer, "decoder": decoder, "dtype": dtype}
    said = {name: str(value).removeprefix("torch.") for name, value in asked.items() if value is not None}
    plain = EagerEngine(parts) if engine == "plain" else None
    return Pipeline(parts, plain, loaded=said if known is not None else {"model": str(what), **said})
