"""How parameters are called in files: diffusers folders old and new, and the original single files.

The tables are templates read in both directions: our name on the left, the original one on the right. A mark says
how the tensor is stored there: `[0]`, `[1]`, `[2]` one third of the rows of a fused tensor, `[T]` transposed,
`[1x1]` as a convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from fewstep.formats.tensors import Shape
from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.config import AutoencoderConfig, UNetConfig
from fewstep.models.networks import Networks
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import Family

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
TEXT_PREFIXES: Mapping[Family, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "sdxl-refiner": ("conditioner.embedders.0.model.",),
}
"""Where each family keeps its text towers; those under `model.` are OpenCLIP's."""

Network = UNet | AutoencoderKL | TextEncoder
Table = Mapping[str, str]

_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}  # fmt: skip
_UNET_RESBLOCK = {
    "{}.norm1": "{}.in_layers.0", "{}.conv1": "{}.in_layers.2", "{}.time_emb_proj": "{}.emb_layers.1",
    "{}.norm2": "{}.out_layers.0", "{}.conv2": "{}.out_layers.3", "{}.conv_shortcut": "{}.skip_connection",
}  # fmt: skip
_AUTOENCODER_SIDE = {
    "{}.conv_in": "{}.conv_in", "{}.conv_norm_out": "{}.norm_out", "{}.conv_out": "{}.conv_out",
    "{}.mid_block.resnets.0": "{}.mid.block_1", "{}.mid_block.resnets.1": "{}.mid.block_2",
    "{}.mid_block.attentions.0.group_norm": "{}.mid.attn_1.norm",
    "{}.mid_block.attentions.0.to_q": "{}.mid.attn_1.q[1x1]", "{}.mid_block.attentions.0.to_k": "{}.mid.attn_1.k[1x1]",
    "{}.mid_block.attentions.0.to_v": "{}.mid.attn_1.v[1x1]",
    "{}.mid_block.attentions.0.to_out.0": "{}.mid.attn_1.proj_out[1x1]",
}  # fmt: skip
_AUTOENCODER_RESBLOCK = {"{}": "{}", "{}.conv_shortcut": "{}.nin_shortcut"}
_OLD_PIXEL_ATTENTION = {
    f"{side}.mid_block.attentions.0.{ours}": f"{side}.mid_block.attentions.0.{theirs}[1x1]"
    for ours, theirs in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items()
    for side in ("encoder", "decoder")
}
_BARE = {f"text_model.{name}": name for name in ("embeddings", "encoder", "final_layer_norm")}
_OPENCLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection[T]",
}
_OPENCLIP_LAYER = {
    "{}.layer_norm1": "{}.ln_1", "{}.layer_norm2": "{}.ln_2", "{}.self_attn.out_proj": "{}.attn.out_proj",
    "{}.self_attn.q_proj.weight": "{}.attn.in_proj_weight[0]", "{}.self_attn.q_proj.bias": "{}.attn.in_proj_bias[0]",
    "{}.self_attn.k_proj.weight": "{}.attn.in_proj_weight[1]", "{}.self_attn.k_proj.bias": "{}.attn.in_proj_bias[1]",
    "{}.self_attn.v_proj.weight": "{}.attn.in_proj_weight[2]", "{}.self_attn.v_proj.bias": "{}.attn.in_proj_bias[2]",
    "{}.mlp.fc1": "{}.mlp.c_fc", "{}.mlp.fc2": "{}.mlp.c_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a file, and how: see the marks in the module's docstring."""

    key: str
    mark: str = ""

    def stored(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that a file may hold for a parameter of `shape`; the first is the one to write."""
        match self.mark:
            case "0" | "1" | "2":
                return ((3 * shape[0], *shape[1:]),)
            case "T":
                return (shape[::-1],)
            case "1x1" if len(shape) == 2:
                return ((*shape, 1, 1), (*shape, 1), shape)
        return (shape,)

    def take(self, tensor: Tensor, shape: Shape) -> Tensor:
        """The parameter out of the stored `tensor`: a view of it, unless that is transposed."""
        if self.mark == "T":
            return tensor.T.contiguous()
        return tensor.chunk(3)[int(self.mark)] if self.mark in ("0", "1", "2") else tensor.reshape(shape)


def diffusers_places(keys: Iterable[str], present: Iterable[str]) -> dict[str, Place]:
    """The places of our `keys` in a diffusers or transformers file that holds the names `present`.

    Text towers are written with and without `text_model.`; old autoencoders name their attention differently.
    """
    names = set(present)
    bare = not any(name.startswith("text_model.") for name in names)
    old = any(".attentions.0.query." in name for name in names)
    return _places(keys, {"": ""} | (_BARE if bare else {}) | (_OLD_PIXEL_ATTENTION if old else {}))


def single_places(family: Family, networks: Networks) -> list[tuple[Network, dict[str, Place]]]:
    """The networks, each with the places of its parameters in an original single file."""
    rows: list[tuple[Network, dict[str, Place]]] = [
        (unet := networks.unet, _places(unet.state_dict(), _unet_table(unet.config), UNET_PREFIX)),
        (
            autoencoder := networks.autoencoder,
            _places(autoencoder.state_dict(), _autoencoder_table(autoencoder.config), AUTOENCODER_PREFIX),
        ),
    ]
    for tower, prefix in zip(networks.text_encoders, TEXT_PREFIXES[family], strict=True):
        layers = ((f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}") for i in range(tower.config.layers))
        clip = prefix.endswith("transformer.")
        table = {"text_model": "text_model"} if clip else _OPENCLIP | _filled(_OPENCLIP_LAYER, *layers)
        rows.append((tower, _places(tower.state_dict(), table, prefix)))
    return rows


def gathered(places: Mapping[str, Place], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to write for `state`: the inverse of taking each parameter from its place."""
    thirds: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        tensor = state[name]
        if place.mark in ("0", "1", "2"):
            thirds.setdefault(place.key, {})[place.mark] = tensor
        elif place.mark == "T":
            tensors[place.key] = tensor.T.contiguous()
        else:
            tensors[place.key] = tensor.reshape(place.stored(tuple(tensor.shape))[0])
    return tensors | {key: torch.cat([rows[mark] for mark in "012"]) for key, rows in thirds.items()}


def _unet_table(config: UNetConfig) -> Table:
    """A UNet's modules in the order of the original's numbered lists of blocks."""
    table, resnets = dict(_UNET), [("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")]
    inputs, outputs = count(1), count()
    for i, stage in enumerate(config.stages):
        for j, n in enumerate(islice(inputs, stage.resnets)):
            resnets.append((f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"))
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{next(inputs)}.0.op"
    for i, stage in enumerate(reversed(config.stages)):
        for j, n in enumerate(islice(outputs, stage.resnets + 1)):
            resnets.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0"))
            table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        place = 2 if stage.depth else 1  # the doubling stands behind the last transformer, where there is one
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n}.{place}.conv"
    return table | _filled(_UNET_RESBLOCK, *resnets)


def _autoencoder_table(config: AutoencoderConfig) -> Table:
    """An autoencoder's modules; the original numbers the decoder's levels from the picture's side."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets = []
    for i in range(len(config.channels)):
        up = len(config.channels) - 1 - i
        table[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        table[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
        for j in range(config.resnets + 1):
            resnets.append((f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}"))
            resnets.append((f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}"))
    sides = _filled(_AUTOENCODER_SIDE, ("encoder", "encoder"), ("decoder", "decoder"))
    return table | sides | _filled(_AUTOENCODER_RESBLOCK, *resnets)


def _filled(templates: Table, *names: tuple[str, str]) -> dict[str, str]:
    """The templates with each pair of names in their holes."""
    return {a.format(ours): b.format(theirs) for a, b in templates.items() for ours, theirs in names}


def _places(keys: Iterable[str], table: Table, prefix: str = "") -> dict[str, Place]:
    """Each key by the longest of its beginnings that the table has."""
    places = {}
    for key in keys:
        head = key
        while head not in table:
            head = head.rpartition(".")[0]
        name, _, marked = (table[head] + key[len(head) :]).partition("[")
        mark, _, rest = marked.partition("]")
        places[key] = Place(prefix + name + rest, mark)
    return places
