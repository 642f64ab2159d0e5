"""Loading a model: by its name, from a diffusers folder, an original single file, or the hub.

Configs and files are untrusted: networks are built without weights, all is compared with the files, then all is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewstep.diffusion.denoiser import Prediction
from fewstep.errors import CheckpointError, InputError, quoted, some, unknown
from fewstep.formats.tensors import TensorFile, joined, kind_of, read_safetensors
from fewstep.formats.unpickle import read_torch
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, TextConfig, UNetConfig, tiny_width
from fewstep.models.networks import Network, Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tiny_autoencoder import TinyAutoencoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE, TINY, TINY_NAMES, Entry
from fewstep.text.tokenizer import Tokenizer
from fewstep.weights.compatible import check_parts
from fewstep.weights.derived_model import derived_model
from fewstep.weights.fetch import ASSETS, named, resolve
from fewstep.weights.folder import parsed, parts_of, read_json, weight_files
from fewstep.weights.layouts import Place, diffusers_places, single_places
from fewstep.weights.model import LoadedModel, ModelSpec, family_of, published, usual_defaults
from fewstep.weights.scheduler import PREDICTIONS, SchedulerConfig
from fewstep.weights.single import DROPPED, recognise, stated_scheduler, tokenizers_of

CPU = torch.device("cpu")
MOST_LAYERS = 1000  # residual blocks and transformer layers; SDXL's UNet has 30 on its way down
LARGEST_SIDE = 1024  # latent pixels
SHOWN = 3  # names of each kind of problem
_IGNORED = re.compile(r".*embeddings\.position_ids")  # text towers were published with 0 to 76 as if they were weights

_FOREIGN_PIPELINES = {
    "StableDiffusion3": " (Stable Diffusion 3)",
    "Flux": " (the Flux family)",
    "PixArt": " (PixArt)",
    "Kandinsky": " (Kandinsky)",
    "Upscale": " (an upscaler)",
}
_OUTDATED = {"steps_offset": 1, "clip_sample": False}  # what diffusers' pipelines of SD 1 and 2 put into old files
_OTHER_PARTS = ("adapter", "controlnet", "depth_estimator", "low_res_scheduler", "motion_adapter", "unet_2")
_FOREIGN_PARTS = {  # by the class in a config.json
    "ControlNet": "a ControlNet, which fewstep does not read",
    "AutoencoderKL": "an autoencoder alone; give the folder of a whole model",
    "AutoencoderTiny": "a tiny autoencoder; load a whole model with decoder= this folder",
    "UNet2DConditionModel": "a UNet alone; give the folder of the whole model, one level up",
    "Transformer2DModel": "the transformer of a newer family (Stable Diffusion 3, Flux), which fewstep does not read",
}

Config = TypeVar("Config", UNetConfig, AutoencoderConfig, TextConfig)


class LoadPlan(NamedTuple):
    """A file, the networks on the meta device and where their parameters lie in it, and the names left aside."""

    file: TensorFile
    networks: Sequence[tuple[nn.Module, Mapping[str, Place]]]
    ignored: re.Pattern[str]


def load_model(
    what: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
    revision: str | None = None,
    prediction: str | None = None,
    tokenizer: Path | None = None,
    decoder: str | Path | None = None,
) -> LoadedModel:
    """The model `what`, ready to run, in `dtype` on `device`; the options are those of `fewstep.load`.

    Raises CheckpointError for files that do not load, with nothing half loaded, and InputError for an unknown name.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise InputError(unknown("prediction", prediction, PREDICTIONS))
    if isinstance(entry := named(what), Entry) and entry.family == "tiny":
        raise InputError(f"{what} is a decoder alone and draws nothing; name a whole model")
    path, known = resolve(what, half=dtype.itemsize == 2, revision=revision)
    folder = path.is_dir()
    model, plans = _folder_model(path, half=dtype.itemsize == 2) if folder else _file_model(path, prediction, tokenizer)
    spec = model.spec
    check_parts(path, spec.unet, spec.autoencoder, spec.texts, model.tokenizers)
    _fill(plans, dtype, device)
    scheduler = spec.scheduler if prediction is None else replace(spec.scheduler, prediction=prediction)
    model = model.with_spec(scheduler=scheduler, revision=revision)
    if known is not None:
        base = known if known.base is None else CATALOGUE[known.base]
        model = model._replace(spec=published(model.spec, base))
        model = model if known.base is None else derived_model(model, known)
    if decoder is not None:
        model = model.with_tiny(_decoder(decoder, model.spec, dtype, device))
    return model


def _decoder(decoder: str | Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> TinyAutoencoder:
    """The tiny autoencoder of that name, or that of the model's family for "tiny"."""
    if spec.autoencoder.factor != 8:
        raise InputError(
            f"{spec.name} draws pictures {spec.autoencoder.factor} times as wide as latents; a tiny decoder needs 8"
        )
    return load_tiny(TINY[spec.family] if decoder == "tiny" else decoder, dtype=dtype, device=device)


def load_tiny(what: str | Path, *, dtype: torch.dtype, device: torch.device = CPU) -> TinyAutoencoder:
    """A tiny autoencoder by its name (of `TINY_NAMES`), folder or hub id; raises as `load_model` does."""
    path, _ = resolve(what, half=dtype.itemsize == 2)
    if not path.is_dir() or (path / "model_index.json").is_file():
        raise InputError(f"{what} is not the folder of a tiny autoencoder; those are {', '.join(TINY_NAMES)}")
    with torch.device("meta"):
        network = TinyAutoencoder(parsed(path / "config.json", tiny_width))
    _fill([_load_plan(path, network, half=dtype.itemsize == 2)], dtype, device)
    return network


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a file of weights, by what it holds and not by its name; CheckpointError for another file."""
    return read_torch(path) if kind_of(path) == "torch" else read_safetensors(path)


def open_part(folder: Path, *, half: bool = False) -> TensorFile:
    """The tensors of one part's folder, shards as one file; CheckpointError when it has none."""
    path, *shards = weight_files(folder, half=half)
    return joined(path, map(open_tensors, shards)) if shards else open_tensors(path)


def _folder_model(folder: Path, *, half: bool) -> tuple[LoadedModel, list[LoadPlan]]:
    """The model in a diffusers folder, without weights, and what is to fill them."""
    index, notes = _index(folder)
    names = [name for name in parts_of(index) if name.startswith("text_encoder")]
    home = {name: _home(folder, name, notes) for name in ("scheduler", "unet", "vae", *names)}
    unet = _network(home["unet"], UNet, UNetConfig.from_diffusers)
    scheduler = read_scheduler(home["scheduler"], unet.config)
    autoencoder = _network(home["vae"], AutoencoderKL, AutoencoderConfig.from_diffusers)
    towers = [_network(home[name], TextEncoder, TextConfig.from_transformers) for name in names]
    words = [name.replace("text_encoder", "tokenizer") for name in names]
    tokenizers = [Tokenizer.from_folder(_home(folder, name, notes)) for name in words]
    networks = zip(("unet", "vae", *names), (unet, autoencoder, *towers), strict=True)
    family, size = family_of(unet.config), _native_size(folder, autoencoder.config.factor)
    noted = notes.get("defaults") or {}
    model = LoadedModel.of(
        Networks(unet=unet, autoencoder=autoencoder, text_encoders=tuple(towers)),
        tuple(tokenizers),
        name=str(notes.get("name", folder.name)),
        family=family,
        scheduler=scheduler,
        defaults=usual_defaults(family, scheduler, size, noted if isinstance(noted, dict) else {}),
        licence=str(notes.get("licence", "unknown")),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", family == "sdxl")),
    )
    return model, [_load_plan(home[name], network, half=half) for name, network in networks]


def read_scheduler(folder: Path, unet: UNetConfig) -> SchedulerConfig:
    """What the scheduler_config.json in `folder` says of a model with that UNet, as diffusers' pipelines read it."""
    outdated = {} if unet.addition else _OUTDATED
    return parsed(folder / "scheduler_config.json", lambda config: SchedulerConfig.from_diffusers(config | outdated))


def _home(folder: Path, name: str, notes: Mapping[str, Any]) -> Path:
    """The folder of a part; one that is not there is the embedded model's that the notes name as `base`."""
    known = CATALOGUE.get(str(notes.get("base")))
    shared = known is not None and known.source is None and not (folder / name).exists()
    return ASSETS / known.name / name if known is not None and shared else folder / name


def _index(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The folder's model_index.json and fewstep's notes in it; CheckpointError when the folder cannot draw."""
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} has no model_index.json, so it is {_single_part(folder)}")
    index = read_json(folder / "model_index.json")
    names, notes = parts_of(index), index.get("_fewstep", {})
    texts = () if "text_encoder_2" in names else ("text_encoder",)
    lacking = [name for name in ("unet", "vae", *texts) if name not in names]
    if lacking or (more := [name for name in _OTHER_PARTS if any(index.get(name) or ())]):
        what = f"without {' and '.join(lacking)}" if lacking else f"with {' and '.join(more)}"
        kind = quoted(index.get("_class_name"))
        known = next((what for mark, what in _FOREIGN_PIPELINES.items() if mark in kind), "")
        raise CheckpointError(
            f"{folder} is a {kind}{known} {what}; fewstep draws with the text-to-image and inpainting models of "
            "SD 1, SD 2 and SDXL alone"
        )
    return index, notes if isinstance(notes, dict) else {}


def _single_part(folder: Path) -> str:
    """What a folder is that is no whole model, with what to do."""
    if any((folder / name).is_file() for name in ("pytorch_lora_weights.safetensors", "adapter_config.json")):
        return "the folder of a LoRA; load its model, and add it with fewstep.add_lora or --lora"
    path = folder / "config.json"
    kind = str(read_json(path).get("_class_name", "")) if path.is_file() else ""
    found = next((what for mark, what in _FOREIGN_PARTS.items() if mark in kind), "")
    files = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".ckpt"))
    other = f"; if a file in it is one, give that: {quoted(files[0])}" if files else ""
    return found or f"not the diffusers folder of a whole model{other}"


def _file_model(
    path: Path, prediction: Prediction | None, tokenizer: Path | None
) -> tuple[LoadedModel, list[LoadPlan]]:
    """The model in an original single file, without weights, and what is to fill them; see `load_model`."""
    contents = recognise(file := open_tensors(path))
    family = contents.family
    check_parts(path, contents.unet, contents.autoencoder, contents.texts)  # before the prediction is asked for
    scheduler = stated_scheduler(file, family, prediction)
    small = family == "sd1" or (family == "sd2" and scheduler.prediction == "epsilon")
    side = 512 if small else 768 if family == "sd2" else 1024
    networks = Networks(
        unet=_built(UNet, contents.unet, path),
        autoencoder=_built(AutoencoderKL, contents.autoencoder, path),
        text_encoders=tuple(_built(TextEncoder, config, path) for config in contents.texts),
    )
    model = LoadedModel.of(
        networks,
        tokenizers_of(path, family, tokenizer),
        name=path.stem,
        family=family,
        scheduler=scheduler,
        defaults=usual_defaults(family, scheduler, (side, side)),
        licence=file.notes.get("modelspec.license", "unknown"),
        force_zeros_for_empty_prompt=family == "sdxl",
    )
    places = single_places(family, networks)
    return model, [LoadPlan(file, places, DROPPED)]


def _network(folder: Path, network: Callable[[Config], Network], parse: Callable[[dict[str, Any]], Config]) -> Network:
    """The network that a part's config.json describes, on the meta device."""
    path = folder / "config.json"
    return _built(network, parsed(path, parse), path)


def _built(network: Callable[[Config], Network], config: Config, source: Path) -> Network:
    """The network on the meta device; CheckpointError when none, or an absurdly large one, has that shape."""
    try:
        if (layers := _layers(config)) <= MOST_LAYERS:
            with torch.device("meta"), _Unfilled():
                return network(config)
    except (RuntimeError, ArithmeticError, TypeError, LookupError, ValueError) as error:
        raise CheckpointError(f"{source} describes a network that cannot be built: {error}") from error
    raise CheckpointError(f"{source} describes {layers} layers; expected at most {MOST_LAYERS}")


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters as they are: to fill them on the meta device would import torch's compiler, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def _load_plan(folder: Path, network: nn.Module, *, half: bool) -> LoadPlan:
    file = open_part(folder, half=half)
    return LoadPlan(file, [(network, diffusers_places(network.state_dict(), file.shapes))], _IGNORED)


def _native_size(folder: Path, factor: int) -> tuple[int, int]:
    """Width and height in pixels of the pictures a UNet was trained on."""
    path = folder / "unet" / "config.json"
    given = read_json(path).get("sample_size")
    side = 64 if given is None else given
    sides = side if isinstance(side, list) else [side, side]
    if len(sides) != 2 or not all(type(each) is int and 0 < each <= LARGEST_SIDE for each in sides):
        raise CheckpointError(f"{path}: sample_size is {quoted(side)}; expected one or two whole numbers, as 64")
    return sides[1] * factor, sides[0] * factor


def _fill(plans: Sequence[LoadPlan], dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter its tensor, in `dtype` on `device`, and set the networks to evaluation without gradients.

    Tensors that are in `dtype` already stay mapped to their file. One CheckpointError names all that is missing, of
    another shape, not of floating point, or unexpected; then nothing was read.
    """
    if problems := [line for plan in plans for line in _misfits(plan)]:
        raise CheckpointError("these weights do not fit; nothing was loaded.\n  " + "\n  ".join(problems))
    for file, networks, _ in plans:
        for network, places in networks:
            state = {}
            for name, parameter in network.state_dict().items():
                stored = file.read(places[name].key, file.dtypes[places[name].key] == dtype)
                value = places[name].take(stored, tuple(parameter.shape)).to(device, dtype)
                state[name] = value.contiguous(memory_format=torch.channels_last) if _is_filter(value) else value
            network.load_state_dict(state, assign=True)
            network.requires_grad_(False).eval()


def _is_filter(weight: Tensor) -> bool:
    """Whether it is a convolution's on a card, whose library reads filters channels last."""
    return weight.is_cuda and weight.ndim == 4


def _layers(config: UNetConfig | AutoencoderConfig | TextConfig) -> int:
    if isinstance(config, TextConfig):
        return config.layers
    if isinstance(config, AutoencoderConfig):
        return len(config.channels) * config.resnets
    return config.mid_depth + sum(stage.resnets * (1 + stage.depth) for stage in config.stages)


def _misfits(plan: LoadPlan) -> list[str]:
    """A line for each kind of tensor that the file has not, has differently, or has too much."""
    file, networks, ignored = plan
    found = defaultdict[str, set[str]](set)
    unwanted = {key for key in file.shapes if not ignored.fullmatch(key)}
    for network, places in networks:
        for name, parameter in network.state_dict().items():
            key, shapes = places[name].key, places[name].stored(tuple(parameter.shape))
            unwanted.discard(key)
            if key not in file.shapes:
                found["missing"].add(key)
            elif file.shapes[key] not in shapes:
                found["of another shape"].add(f"{key}: file {file.shapes[key]}, model {shapes[0]}")
            elif not file.dtypes[key].is_floating_point:
                found["not of floating point"].add(f"{key}: {file.dtypes[key]}")
    if unwanted:
        found["unexpected"] = unwanted
    return [f"{file.path}: {len(names)} {what}: {some(names, SHOWN)}" for what, names in found.items()]
