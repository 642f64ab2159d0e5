"""Reading LoRA files of all common layouts; the layout is told from the names of the tensors."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fewstep.adapters.lora import Factors, Layer, Lora, layers_of, networks
from fewstep.adapters.names import layer_names
from fewstep.errors import CheckpointError, InputError, quoted, some
from fewstep.files import reading
from fewstep.formats.tensors import TensorFile
from fewstep.weights.folder import read_json
from fewstep.weights.load import open_tensors
from fewstep.weights.model import Loaded

NOTE = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in a .safetensors file
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of folders by PEFT and by diffusers
_PEFT_SETTINGS = "adapter_config.json"
MOST_PATTERNS = 2_000  # of alphas, each compared with each layer; SDXL has about 1,000 layers
_KEY = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.\w+)?\.weight|\.(alpha))")
_ROLES = {"A": "down", "B": "up"}
_OTHER_KINDS = {  # by names of tensors that plain LoRA has not
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"hada_": "a LoHa (LyCORIS)",
    r"lokr_": "a LoKr (LyCORIS)",
    r"lora_mid": "a LoCon with a Tucker core (LyCORIS)",
    r"oft_": "an OFT",
    r"on_input": "an IA3",
    r"lora_embedding": "a LoRA of embeddings",
    r"lora_(A|B|down|up)(\.\w+)?\.bias": "a LoRA with biases",
    r"\.diff(_b)?$": "a LoRA with whole differences",
}
_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL", 1280: "the SDXL refiner"}  # of the text states
_OTHER_MODELS = {
    r"double_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks": "SD 3",
    r"lora_te2_|text_encoder_2\.": "SDXL",
}
_FAMILIES = {"sd1": "SD 1", "sd2": "SD 2", "sdxl": "SDXL", "sdxl-refiner": "the SDXL refiner"}

Keys = Mapping[str, str]  # "down", "up" and "alpha" -> the name of the tensor
Problems = defaultdict[str, set[str]]  # what is wrong -> with which layers


def read_lora(what: str | Path, model: Loaded) -> Lora:
    """The LoRA in the file `what` (or in the folder that diffusers or PEFT wrote), for `model`.

    Layouts: diffusers old and new, PEFT, kohya, ComfyUI; of linear layers and convolutions, a rank for each layer. A
    missing alpha is the rank. Raises CheckpointError for another kind of adapter, a LoRA of another model or a broken
    file, and InputError where there is none.
    """
    file, known = open_tensors(_resolve(Path(what).expanduser())), layers_of(networks(model))
    layers, problems = _sorted(file, layer_names(model))
    for name, keys in layers.items():
        if problem := _misfit(file, keys, known[name]):
            problems[problem].add(name)
    if problems:
        raise CheckpointError(_refusal(file, model, problems))
    settings = _settings(file)
    factors = {name: _factors(file, keys, name, settings) for name, keys in layers.items()}
    return Lora(name=file.path.stem, layers=factors)


def _resolve(path: Path) -> Path:
    if path.is_file():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    missing = f"has neither {' nor '.join(_FILES)}" if path.is_dir() else "is not there"
    raise InputError(f"the LoRA {path} {missing}; give the path of a .safetensors file")


def _sorted(file: TensorFile, names: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], Problems]:
    """The names of the tensors by layer and role, and the layers that the model has not."""
    layers, problems, strangers = defaultdict[str, dict[str, str]](dict), Problems(set), set()
    for key in file.shapes:
        match = _KEY.fullmatch(key.replace("base_model.model.", "").replace(".processor.", "."))
        if match is None:
            strangers.add(key)
            continue
        layer, half, alpha = match.groups()
        if layer not in names:
            problems["unknown to it"].add(layer)
        elif layers[names[layer]].setdefault(alpha or _ROLES.get(half, half), key) != key:
            problems["there twice"].add(layer)
    if strangers or not file.shapes:
        raise CheckpointError(_other_kind(file, strangers))
    return layers, problems


def _other_kind(file: TensorFile, strangers: Collection[str]) -> str:
    """What a file with such names is instead of a LoRA."""
    for mark, what in _OTHER_KINDS.items():
        if telling := [key for key in strangers if re.search(mark, key)]:
            return f"{file.path} is {what}, which fewstep does not apply, as these show: {some(telling)}"
    whole = "no LoRA" if len(strangers) == len(file.shapes) else "more than a LoRA"
    found = some(strangers) or "nothing"
    return f"{file.path} holds {whole}: {found}; expected names such as lora_unet_*.lora_down.weight"


def _misfit(file: TensorFile, keys: Keys, layer: Layer) -> str | None:
    """What is wrong with a layer's tensors."""
    if not {"down", "up"} <= keys.keys():
        return "without one of their two halves"
    down, up, weight = file.shapes[keys["down"]], file.shapes[keys["up"]], layer.weight.shape
    if not all(file.dtypes[keys[role]].is_floating_point for role in ("down", "up")):
        return "not of floating point"
    outside = min(len(down), len(up)) > 1 and up[0] == weight[0] and math.prod(down[1:]) == weight[1:].numel()
    if not (outside and 0 < down[0] == math.prod(up[1:])):
        return "of another shape"
    if "alpha" in keys and math.prod(file.shapes[keys["alpha"]]) != 1:
        return "with several alphas"
    return None


def _refusal(file: TensorFile, model: Loaded, problems: Problems) -> str:
    made_for, own = _made_for(file), _FAMILIES.get(model.spec.family, model.spec.family)
    what = f"is made for {made_for} and" if made_for not in (None, own) else "is a LoRA that"
    lines = [f"  layers {problem} ({len(names)}): {some(names)}" for problem, names in problems.items()]
    return "\n".join([f"{file.path} {what} does not fit {model.spec.name} ({own}); nothing was applied.", *lines])


def _made_for(file: TensorFile) -> str | None:
    """The family of models that the file's names and shapes tell of."""
    for mark, model in _OTHER_MODELS.items():
        if any(re.search(mark, key) for key in file.shapes):
            return model
    reads_text = re.compile(r"(?>.*?attn2.to_k).*(down|lora_A)")
    widths = (shape[1] for key, shape in file.shapes.items() if reads_text.match(key) and len(shape) > 1)
    return next((_WIDTHS[width] for width in widths if width in _WIDTHS), None)


def _settings(file: TensorFile) -> Mapping[str, Any]:
    """PEFT's settings, beside the file or in its metadata."""
    beside = file.path.with_name(_PEFT_SETTINGS)
    if file.path.stem == "adapter_model" and beside.is_file():
        return read_json(beside)
    try:
        found = json.loads(file.notes.get(NOTE, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path} has metadata ({NOTE}) that is not JSON: {quoted(str(error))}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.path} has metadata ({NOTE}) that is no JSON object")
    return found


def _factors(file: TensorFile, keys: Keys, name: str, settings: Mapping[str, Any]) -> Factors:
    with reading(file.path):
        return _checked_factors(file, keys, name, settings)


def _checked_factors(file: TensorFile, keys: Keys, name: str, settings: Mapping[str, Any]) -> Factors:
    down, up = (file.read(keys[role], False) for role in ("down", "up"))
    alpha = file.read(keys["alpha"], True).item() if "alpha" in keys else _noted_alpha(settings, name, len(down))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{file.path}: the alpha of {name} is {quoted(alpha)}; expected a number")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise CheckpointError(f"{file.path}: {name} holds NaN or infinity")
    return Factors(down=down, up=up, alpha=float(alpha))


def _noted_alpha(settings: Mapping[str, Any], name: str, rank: int) -> Any:
    """A layer's alpha by PEFT's settings, which one file may hold for several networks; the rank without any."""
    network, _, layer = name.partition(".")

    def noted(key: str, usual: Any) -> Any:
        return settings.get(f"{network}.{key}", settings.get(key, usual))

    alpha, patterns, end = noted("lora_alpha", rank), noted("alpha_pattern", None), f".{layer}"
    if isinstance(patterns, dict):
        if len(patterns) > MOST_PATTERNS:
            raise CheckpointError(f"PEFT's settings have {len(patterns):,} alphas; at most {MOST_PATTERNS:,} are read")
        alpha = next((a for pattern, a in patterns.items() if end.endswith("." + pattern.removeprefix("^"))), alpha)
    return alpha * math.sqrt(rank) if noted("use_rslora", False) and isinstance(alpha, int | float) else alpha
