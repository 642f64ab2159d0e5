"""Saving a LoRA as a file that diffusers, ComfyUI and the others read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.adapters.lora import Factors, Lora
from fewstep.adapters.names import kohya_names
from fewstep.adapters.read import NOTE
from fewstep.errors import InputError, unknown
from fewstep.weights.save import write_tensors

Layout = Literal["diffusers", "kohya"]

_PEFT = ("lora_A", "lora_B")
_TOWER = ("lora_linear_layer.down", "lora_linear_layer.up")  # the names that diffusers takes for all of its layers


def save_lora(lora: Lora, path: str | Path, *, layout: Layout = "diffusers", dtype: torch.dtype | None = None) -> None:
    """Write a .safetensors file, in `dtype` or as it is; it appears whole or not at all.

    The layout "diffusers" notes ranks and alphas for PEFT; since some programs read the tensors alone and take the rank
    for alpha, `up` is scaled to make that true. "kohya" is what kohya's trainer writes, and most programs read.
    """
    path, layouts = Path(path), {"diffusers": _diffusers, "kohya": _kohya}
    if layout not in layouts:
        raise InputError(unknown("layout", layout, layouts))
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise InputError(f"a LoRA cannot be saved as {path}; name a .safetensors file in a folder that is there")
    tensors, notes = layouts[layout](lora)
    write_tensors(tensors, path, dtype, notes)


def _diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    for name, factors in lora.layers.items():
        down, up = _PEFT if name.startswith("unet.") else _TOWER
        scale = factors.alpha / factors.rank
        tensors[f"{name}.{down}.weight"] = factors.down
        tensors[f"{name}.{up}.weight"] = factors.up if scale == 1 else factors.up * scale
    return tensors, {NOTE: json.dumps(_peft_settings(lora.layers))}


def _peft_settings(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """For each network the settings from which PEFT makes a LoRA of these layers."""
    settings: dict[str, Any] = {}
    for network in dict.fromkeys(name.split(".")[0] for name in layers):
        prefix = f"{network}."
        ranks = {  # transformers has a `text_model` or not, and PEFT takes the ends of names
            name.removeprefix(prefix).removeprefix("text_model."): factors.rank
            for name, factors in layers.items()
            if name.startswith(prefix)
        }
        usual = Counter(ranks.values()).most_common(1)[0][0]
        unusual = {name: rank for name, rank in ranks.items() if rank != usual}
        shape = {"r": usual, "rank_pattern": unusual, "lora_alpha": usual, "alpha_pattern": unusual}
        settings |= {prefix + key: value for key, value in {**shape, "target_modules": list(ranks)}.items()}
    return settings


def _kohya(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    for ours, name in kohya_names(lora.layers).items():
        factors = lora.layers[ours]
        tensors[f"{name}.lora_down.weight"] = factors.down
        tensors[f"{name}.lora_up.weight"] = factors.up
        tensors[f"{name}.alpha"] = torch.tensor(factors.alpha)
    return tensors, {"ss_network_module": "networks.lora"}
