"""Saving a model: as a diffusers folder that diffusers reads, or as an original single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import InputError, NotFiniteError, quoted
from fewstep.files import atomic_write, partial_folder, partial_path, recover_folder
from fewstep.formats.tensors import TensorFile
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.weights.layouts import gathered, single_places
from fewstep.weights.model import Loaded, ModelSpec, family_of
from fewstep.weights.single import Contents, recognise

_ABSENT = [None, None]


def save_model(model: Loaded, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers folder, with weights in `dtype` or as they are.

    The folder appears whole or not at all. An older model folder of that name is replaced, at once: a kill leaves the
    one or the other. InputError if something else is there.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with partial_folder(folder) as partial:
        _write_folder(model, partial, dtype)


def check_replaceable(folder: Path) -> None:
    """InputError if something other than a model folder is where a model is to be saved."""
    recover_folder(folder)
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a model folder; name another one")


def save_single_file(model: Loaded, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors file in the original layout of the family.

    InputError for shapes that the layout cannot tell: it names no numbers of heads, for one.
    """
    spec, networks, path = model.spec, model.networks, Path(path)
    family, tensors = family_of(spec.unet), dict[str, Tensor]()
    for network, places in single_places(family, networks):
        tensors |= gathered(places, network.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    read = recognise(TensorFile(path=path, shapes=shapes, dtypes={}, read=lambda name, _: tensors[name]))
    mine = Contents(family, spec.unet, spec.autoencoder, spec.texts)
    if read != mine:
        raise InputError(f"{path}: the single-file layout would read {read}, but the model is {mine}; save a folder")
    notes = {"modelspec.prediction_type": spec.scheduler.prediction, "modelspec.license": spec.licence}
    write_tensors(tensors, path, dtype, notes)


def save_tiny(network: TinyAutoencoder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder of a tiny autoencoder, as diffusers' `AutoencoderTiny` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    widths = [network.width] * 4
    config = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    _write_part(folder, network, {"_class_name": "AutoencoderTiny", "latent_channels": 4, **config}, dtype)


def _write_folder(model: Loaded, folder: Path, dtype: torch.dtype | None) -> None:
    spec, networks = model.spec, model.networks
    width, factor, index = spec.defaults.width, spec.autoencoder.factor, _index(spec)
    _write_part(folder / "unet", networks.unet, spec.unet.to_diffusers(width // factor), dtype)
    _write_part(folder / "vae", networks.autoencoder, spec.autoencoder.to_diffusers(width), dtype)
    alone = family_of(spec.unet) == "sdxl-refiner"  # its one text encoder stands second
    names = ("text_encoder_2",) if alone else ("text_encoder", "text_encoder_2")
    for name, text, encoder, tokenizer in zip(
        names, spec.texts, networks.text_encoders, model.tokenizers, strict=False
    ):
        config, words = text.to_transformers(), name.replace("text_encoder", "tokenizer")
        _write_part(folder / name, encoder, config, dtype)
        tokenizer.save(folder / words)
        index[name] = ["transformers", *config["architectures"]]
        index[words] = ["transformers", "CLIPTokenizer" if tokenizer.unk is None else "PreTrainedTokenizerFast"]
    _write_json(folder / "scheduler" / "scheduler_config.json", spec.scheduler.to_diffusers())
    _write_json(folder / "model_index.json", index)


def _write_part(folder: Path, network: nn.Module, config: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    _write_json(folder / "config.json", config)
    write_tensors(network.state_dict(), folder / f"{stem}.safetensors", dtype)


def _index(spec: ModelSpec) -> dict[str, Any]:
    """The model_index.json without the text towers, which are said to be absent where they need not be there."""
    family, unet = family_of(spec.unet), spec.unet
    kind = "Img2Img" if family == "sdxl-refiner" else "Inpaint" if unet.in_channels == 9 else ""
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if unet.addition else ''}{kind}Pipeline",
        "_diffusers_version": "0.35.0",
        "_fewstep": {"name": spec.name, "licence": spec.licence, "defaults": asdict(spec.defaults)},
        "scheduler": ["diffusers", spec.scheduler.to_diffusers()["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": _ABSENT,
        "image_encoder": _ABSENT,
    }
    if not unet.addition:
        return index | {"safety_checker": _ABSENT, "requires_safety_checker": False}
    index |= {"text_encoder": _ABSENT, "tokenizer": _ABSENT}
    index["force_zeros_for_empty_prompt"] = spec.force_zeros_for_empty_prompt
    return index | ({"requires_aesthetics_score": True} if family == "sdxl-refiner" else {})


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file that appears whole or not at all, in `dtype` or as the tensors are.

    Raises NotFiniteError, and writes nothing, for numbers that are NaN or infinite, or become so in `dtype`.
    """
    ready = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in ready.items():
        if not tensor.isfinite().all():
            fits = tensors[name].isfinite().all()
            why = f"numbers too large for {tensor.dtype}; save it in torch.float32" if fits else "NaN or infinity"
            raise NotFiniteError(f"{path.parent.name}/{path.name} was not written: {quoted(name)} holds {why}")
    with partial_path(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # save_file gives the file to its owner alone
        save_file(ready, partial, metadata={"format": "pt", **(notes or {})})
        partial.chmod(mode)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
