"""The key tables: a bijection for every full-size model, and the one that diffusers uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fewstep.formats.tensors import TensorFile
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import CATALOGUE, Entry, Family
from fewstep.weights.layouts import TEXT_PREFIXES, Place, diffusers_places, gathered, single_places
from fewstep.weights.load import load_model
from fewstep.weights.save import save_model, save_single_file
from fewstep.weights.single import DROPPED, recognise
from tests.factories import FAMILIES, assert_same_weights, small_model

WHOLE = ("sd-v1-4", "small-sd", "sd-v2-1", "sdxl-base", "sdxl-refiner")  # the turbo models have the shapes of others
KEYS_IN_PUBLISHED_FILE = {"sd-v1-4": 1131 - 1, "sdxl-base": 2515 - 2}  # less position_ids, logit_scale
Network = torch.nn.Module


@cache
def full(name: str) -> tuple[Entry, list[tuple[Network, dict[str, Place]]]]:
    """The networks of an entry on the meta device, each with its places in a single file."""
    known = CATALOGUE[name]
    assert known.unet is not None
    assert known.autoencoder is not None
    with torch.device("meta"):
        unet, autoencoder = UNet(known.unet), AutoencoderKL(known.autoencoder)
        encoders = tuple(TextEncoder(config) for config in known.texts)
    networks = Networks(unet=unet, autoencoder=autoencoder, text_encoders=encoders)
    return known, [*single_places(known.family, networks)]


@cache
def original_shapes(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for network, places in full(name)[1]:
        for key, tensor in network.state_dict().items():
            shapes[places[key].key] = places[key].stored(tuple(tensor.shape))[0]
    return shapes


def meta_file(shapes: Mapping[str, tuple[int, ...]]) -> TensorFile:
    def read(name: str, _: bool) -> Tensor:
        raise AssertionError(name)

    dtypes = dict.fromkeys(shapes, torch.float32)
    return TensorFile(path=Path("a.safetensors"), shapes=shapes, dtypes=dtypes, read=read)


@pytest.mark.parametrize("name", WHOLE)
def test_every_parameter_has_a_place_of_its_own(name: str) -> None:
    places = [place for _, rows in full(name)[1] for place in rows.values()]
    assert max(Counter(places).values()) == 1
    fused = [place.key for place in places if place.mark in ("0", "1", "2")]
    assert set(Counter(fused).values()) <= {3}
    plain = [place.key for place in places if place.mark not in ("0", "1", "2")]
    assert max(Counter(plain).values()) == 1
    assert not set(plain) & set(fused)


@pytest.mark.parametrize("name", KEYS_IN_PUBLISHED_FILE)
def test_the_file_has_as_many_keys_as_the_published_one(name: str) -> None:
    assert len(original_shapes(name)) == KEYS_IN_PUBLISHED_FILE[name]


@pytest.mark.parametrize("name", WHOLE)
def test_a_full_size_model_is_recognised_from_names_and_shapes(name: str) -> None:
    known, _ = full(name)
    found = recognise(meta_file(original_shapes(name)))
    assert found.family == known.family
    assert (found.unet, found.autoencoder, found.texts) == (known.unet, known.autoencoder, known.texts)


def test_the_last_layer_of_sd2s_text_tower_is_left_out_on_purpose() -> None:
    shapes = original_shapes("sd-v2-1")
    prefix = "cond_stage_model.model."
    last = {key.replace(".22.", ".23."): shape for key, shape in shapes.items() if ".resblocks.22." in key}
    assert len(last) == 12
    published = shapes | last | {f"{prefix}text_projection": (1024, 1024), f"{prefix}logit_scale": ()}
    assert recognise(meta_file(published)).texts == CATALOGUE["sd-v2-1"].texts
    assert {key for key in published if DROPPED.fullmatch(key)} == published.keys() - shapes.keys()


@pytest.mark.parametrize("name", WHOLE)
def test_diffusers_recognises_the_same_family(name: str) -> None:
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in original_shapes(name).items()}
    theirs = {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base", "sdxl-refiner": "xl_refiner"}
    assert single_file.infer_diffusers_model_type(checkpoint) == theirs[CATALOGUE[name].family]


@pytest.mark.parametrize("name", WHOLE)
def test_unet_and_autoencoder_names_are_those_of_diffusers_conversion(name: str) -> None:
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    known, rows = full(name)
    assert known.unet is not None
    assert known.autoencoder is not None
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in original_shapes(name).items()}
    names = {id(tensor): key for key, tensor in checkpoint.items()}
    conversions = {
        "unet": (single_file.convert_ldm_unet_checkpoint, known.unet.to_diffusers(64)),
        "vae": (single_file.convert_ldm_vae_checkpoint, known.autoencoder.to_diffusers(512)),
    }
    for part, (network, places) in zip(("unet", "vae"), rows, strict=False):
        convert, config = conversions[part]
        config.setdefault("addition_embed_type", None)
        config.setdefault("class_embed_type", None)
        converted = convert(dict(checkpoint), config)
        theirs = {key: names[id(tensor if tensor._base is None else tensor._base)] for key, tensor in converted.items()}
        assert theirs == {key: place.key for key, place in places.items()}
        assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == {
            key: tuple(tensor.shape) for key, tensor in network.state_dict().items()
        }


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sdxl-refiner"])
def test_open_clip_towers_are_split_as_diffusers_splits_them(family: Family) -> None:
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    prefix, model = TEXT_PREFIXES[family][-1], small_model(family)
    tower, places = single_places(family, model.networks)[-1]
    state = tower.state_dict()
    original = gathered(places, state)
    theirs = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    converted = single_file.convert_open_clip_checkpoint(theirs, original, prefix=prefix)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_and_taking_are_inverse(family: Family) -> None:
    model = small_model(family)
    for network, places in single_places(family, model.networks):
        state = network.state_dict()
        written = gathered(places, state)
        for key, tensor in state.items():
            assert torch.equal(places[key].take(written[places[key].key], tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_single_file_loads_as_the_same_model(family: Family, tmp_path: Path) -> None:
    folder, model = tmp_path, small_model(family)
    save_single_file(model, folder / "model.safetensors")
    for name, words in zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=False):
        words.save(folder / (name if family != "sdxl-refiner" else "tokenizer_2"))
    loaded = load_model(folder / "model.safetensors", dtype=torch.float32, tokenizer=folder)
    assert_same_weights(loaded, model)
    assert loaded.spec.family == family
    assert loaded.spec.scheduler == model.spec.scheduler
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


def test_old_autoencoders_are_renamed() -> None:
    keys = [
        f"encoder.mid_block.attentions.0.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
    ]
    present = [
        f"encoder.mid_block.attentions.0.{name}.weight" for name in ("query", "key", "value", "proj_attn", "group_norm")
    ]
    places = diffusers_places(keys, present)
    assert [places[key].key for key in keys] == present
    weight = torch.randn(4, 4)
    assert torch.equal(places[keys[0]].take(weight[:, :, None, None], (4, 4)), weight)
    assert places[keys[0]].stored((4, 4)) == ((4, 4, 1, 1), (4, 4, 1), (4, 4))


@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")]
)
def test_diffusers_reads_our_single_file_as_it_reads_our_folder(family: Family, kind: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = small_model(family)
    save_model(model, tmp_path / "folder")
    save_single_file(model, tmp_path / "model.safetensors")
    single = getattr(diffusers, kind).from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    for ours, theirs in zip((model.networks.unet, model.networks.autoencoder), (single.unet, single.vae), strict=True):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    for ours, name in zip(model.networks.text_encoders, ("text_encoder", "text_encoder_2"), strict=False):
        state = {key.removeprefix("text_model."): t for key, t in getattr(single, name).state_dict().items()}
        mine = {key.removeprefix("text_model."): tensor for key, tensor in ours.state_dict().items()}
        assert mine.keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in mine.items())
